"""A plan as one HTML page: the model drawn layer by layer, and what stands behind each part. No script, nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from ad_core.cli.facts import cache_bytes, idle_passes, pass_notes
from ad_core.cli.kinds import Kind, kinds, layers, places
from ad_core.progress import megabytes

if TYPE_CHECKING:
    from ad_core.plan import Plan

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2330, #e8eaf0); --soft: light-dark(#5c6577, #9aa3b5);
  --line: light-dark(#d9dee7, #3a4152); --card: light-dark(#ffffff, #1e2330); --page: light-dark(#f4f6fa, #141823); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 2rem; max-width: 1080px; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem; }
p { margin: .3rem 0; } code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .4rem .9rem; }
.facts b { display: block; font-size: 1.1rem; } .facts span { color: var(--soft); font-size: .82rem; }
.yes::before { content: "\\2713\\00a0"; color: #2f9470; font-weight: 700; }
.no::before { content: "\\2717\\00a0"; color: #c24a4a; font-weight: 700; }
.flow { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; }
.end { color: var(--soft); border: 1px solid var(--line); border-radius: 99px; padding: 2px .8rem; }
.layers { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 5px; margin-bottom: .8rem; }
.layer { width: 26px; display: flex; flex-direction: column; gap: 2px; }
.layer i { height: 30px; border-radius: 4px; background: var(--hue); }
.layer small { text-align: center; color: var(--soft); font-size: .68rem; }
.kinds { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: .8rem; }
.kind { background: var(--card); border: 1px solid var(--line); border-left: 8px solid var(--hue); border-radius: 8px;
  padding: .7rem 1rem; }
.kind b { font-size: 1.05rem; } .kind b span { float: right; color: var(--soft); }
dl { display: grid; grid-template-columns: 4.2rem 1fr; gap: .15rem .6rem; margin: .5rem 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } dd.not { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
th, td { text-align: left; padding: .35rem .8rem; border-top: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; border-top: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; } .w { width: 100%; white-space: normal; }
.bar { display: flex; height: 22px; border-radius: 6px; overflow: hidden; background: var(--line); } .bar span { background: var(--hue); }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin-top: .5rem; } .keys span::before { content: ""; display: inline-block;
  width: .7em; height: .7em; border-radius: 3px; background: var(--hue); margin-right: .4em; }
"""
_HUES = ("#3b6fd4", "#c2663a", "#2f9470", "#8a56c2", "#b8962e", "#c24a72", "#3a9fb0", "#7a8a3a", "#6b7689", "#a8583a")


def picture(plan: Plan) -> str:
    """The page."""
    found = kinds(plan)
    title = escape(str(plan.model["name"]))
    parts = [
        f"<h1>{title}</h1>",
        _facts(plan),
        *(
            f'<p class="{"yes" if attempt.accepted else "no"}">{"captured" if attempt.accepted else "refused"} by '
            f"{escape(attempt.way)}: {escape(attempt.reason)}</p>"
            for attempt in plan.attempts
        ),
        "<h2>From token ids to logits</h2>",
        _flow(plan, found),
        "<h2>What mixes tokens, and what computes it</h2>",
        f'<div class="kinds">{"".join(_card(kind, _hue(index)) for index, kind in enumerate(found))}</div>',
        _shares("Memory", plan.memory, {name: megabytes(value) for name, value in plan.memory.items()}, ("total", "cache tokens")),
        _shares("Start", plan.phases, {name: f"{seconds:.1f} s" for name, seconds in plan.phases.items()}, ()),
        "<h2>Passes</h2>",
        _passes(plan),
        *(f'<p class="soft">note: {escape(note)}</p>' for note in plan.notes),
        f'<p class="soft">plan digest <code>{plan.digest}</code></p>',
    ]
    page = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><body>{"".join(parts)}</body>'
    return f'<!doctype html><html lang="en">{page}</html>\n'


def _facts(plan: Plan) -> str:
    model = plan.model
    facts = {
        "architecture": str(model["architecture"]),
        "parameters": f"{model['parameters'] / 1e6:,.0f} M",
        "of weights": f"{megabytes(model['weight_bytes'])} {model['dtype']}",
        "tokens at most": f"{model['max_model_len'] or 0:,}",
        "kept a token": megabytes(cache_bytes(plan, "pages")),
        "kept a sequence": megabytes(cache_bytes(plan, "slots")),
        "tokens fit in the cache": f"{plan.memory.get('cache tokens', 0):,}",
    }
    shown = (f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in facts.items() if value not in ("0", "0 B"))
    return f'<div class="facts">{"".join(shown)}</div>'


def _flow(plan: Plan, found: Sequence[Kind]) -> str:
    """A column a layer, a cell a mixer, coloured by kind."""
    columns = []
    for number, members in layers(plan, found):
        cells = "".join(f'<i style="--hue:{_hue(index)}" title="{escape(found[index].label)}"></i>' for index in members)
        columns.append(f'<div class="layer">{cells}<small>{number}</small></div>')
    keys = (
        f'<span style="--hue:{_hue(index)}">{len(kind.claims)} &times; {escape(kind.label)}'
        f"{'' if kind.window is None else f', window {kind.window}'}</span>"
        for index, kind in enumerate(found)
    )
    return (
        f'<div class="flow"><div class="layers"><span class="end">token ids &rarr;</span>{"".join(columns)}'
        f'<span class="end">&rarr; logits</span></div><div class="keys">{"".join(keys)}</div></div>'
    )


def _card(kind: Kind, hue: str) -> str:
    losers = kind.decision.losers if kind.decision else {}
    rows = [
        ("where", f"<code>{escape(places([claim.module or claim.node for claim in kind.claims]))}</code>"),
        ("op", f"<code>{escape(kind.op)}</code> <span class=soft>by {escape(kind.by)}</span>"),
        ("kernel", f"<code>{escape(kind.kernel)}</code>"),
    ]
    listed = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in rows)
    listed += "".join(f"<dt></dt><dd class=not>not {escape(name)}: {escape(reason)}</dd>" for name, reason in losers.items())
    listed += "".join(f"<dt>{'' if index else 'keeps'}</dt><dd>{escape(line)}</dd>" for index, line in enumerate(kind.keeps))
    count = f"<span>&times; {len(kind.claims)}</span>"
    return f'<div class="kind" style="--hue:{hue}"><b>{escape(kind.label)}{count}</b><dl>{listed}</dl></div>'


def _shares(title: str, values: Mapping[str, float], words: Mapping[str, str], sums: Sequence[str]) -> str:
    """Parts of a whole as one bar, each with its colour and its words; `sums` are no parts."""
    parts = [name for name in values if name not in sums]
    whole = sum(values[name] for name in parts)
    if not whole:
        return ""
    bar = "".join(
        f'<span style="width:{100 * values[name] / whole:.2f}%;--hue:{_hue(index)}" title="{escape(name)}"></span>'
        for index, name in enumerate(parts)
    )
    keys = "".join(f'<span style="--hue:{_hue(index)}">{escape(name)} {escape(words[name])}</span>' for index, name in enumerate(parts))
    total = f' <span class="soft">{escape(words["total"])}</span>' if "total" in words else ""
    return f'<h2>{title}{total}</h2><div class="bar">{bar}</div><div class="keys">{keys}</div>'


def _passes(plan: Plan) -> str:
    idle = set(idle_passes(plan))
    rows = "".join(
        f"<tr><td><code>{escape(entry.name)}</code></td><td>{entry.stage}</td><td>{escape(entry.distribution)}</td>"
        f'<td class="n">{entry.matched}</td><td class="n">{entry.seconds * 1e3:,.0f}</td>'
        f'<td class="w">{escape("; ".join(pass_notes(entry)))}</td></tr>'
        for entry in plan.passes
        if entry.name not in idle
    )
    head = '<tr><th>pass</th><th>stage</th><th>from</th><th class="n">matches</th><th class="n">ms</th><th class="w">notes</th></tr>'
    rest = f'<p class="soft">Nothing to do for {escape(", ".join(sorted(idle)))}.</p>' if idle else ""
    return f"<table>{head}{rows}</table>{rest}"


def _hue(index: int) -> str:
    return _HUES[index % len(_HUES)]
