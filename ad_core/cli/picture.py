"""A plan as one HTML page: the model from the ids to the logits, drawn, with what stands behind each part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ad_core.cli.explain import claim_rows, headline, resource_rows
from ad_core.progress import megabytes, memory_words

if TYPE_CHECKING:
    from ad_core.plan import Claim, Plan

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d2330, #e8eaf0); --soft: light-dark(#5c6577, #9aa3b5);
  --line: light-dark(#d5dae3, #3a4152); --card: light-dark(#ffffff, #1e2330); --page: light-dark(#f4f6fa, #141823); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 2rem; max-width: 1080px; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; } p { color: var(--soft); margin: .2rem 0; }
table { border-collapse: collapse; width: 100%; background: var(--card); border-radius: 8px; overflow: hidden; }
th, td { text-align: left; padding: .45rem .8rem; border-top: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; border-top: 0; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 13px ui-monospace, monospace; } .flow { display: flex; flex-direction: column; align-items: center; gap: 0; }
.end { border: 1px solid var(--line); border-radius: 99px; padding: .3rem 1.2rem; background: var(--card); color: var(--soft); }
.pipe { width: 2px; height: 18px; background: var(--line); }
.block { position: relative; background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--hue); border-radius: 8px;
  padding: .7rem 1rem; width: min(640px, 90%); box-shadow: 0 1px 2px rgb(0 0 0 / 8%); }
.block b { font-size: 1rem; } .block .times { position: absolute; right: 1rem; top: .7rem; color: var(--soft); }
.tag { display: inline-block; border-radius: 6px; padding: 0 .5rem; margin: .25rem .35rem 0 0; font-size: .82rem;
  background: color-mix(in srgb, var(--hue) 18%, transparent); }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; background: var(--line); }
.bar span { display: block; overflow: hidden; white-space: nowrap; font-size: .78rem;
  line-height: 26px; padding-left: .4rem; color: #fff; }
"""
_HUES = ("#3b6fd4", "#c2663a", "#2f9470", "#8a56c2", "#b8962e", "#c24a72")


def picture(plan: Plan) -> str:
    """The page, with no script and nothing to fetch."""
    title = escape(str(plan.model["name"]))
    parts = [
        f"<h1>{title}</h1><p>{escape(headline(plan))}</p>",
        *(f"<p>{'captured' if a.accepted else 'refused'} by {escape(a.way)}: {escape(a.reason)}</p>" for a in plan.attempts),
        "<h2>From ids to logits</h2>",
        _flow(plan),
        "<h2>Who claims what</h2>",
        _table(("layers", "class", "canonical op", "claimed by", "count"), claim_rows(plan)),
        "<h2>Kernels, and why</h2>",
        _table(
            ("for", "winner", "rule", "places", "why not the others"),
            [
                (
                    d.subject,
                    d.winner,
                    d.rule,
                    len(d.members),
                    "; ".join(f"{name}: {reason}" for name, reason in d.losers.items()) or "no others",
                )
                for d in plan.decisions
            ],
        ),
        "<h2>Kept between steps</h2>",
        _table(
            ("resource", "kind", "one entry", "count", "reads back", "bytes"),
            [(*row[:-1], f"{megabytes(row[-1])} a {'token' if row[1] == 'pages' else 'sequence'}") for row in resource_rows(plan)],
        ),
        "<h2>Passes</h2>",
        _table(
            ("pass", "stage", "from", "matches", "ms", "notes"),
            [(p.name, p.stage, p.distribution, p.matched, round(p.seconds * 1e3), "; ".join((*p.notes, *p.declined))) for p in plan.passes],
        ),
        _proportions("Memory", {n: v for n, v in plan.memory.items() if n not in ("total", "cache tokens")}, memory_words(plan.memory)),
        _proportions("Start", plan.phases, [f"{name} {seconds:.1f} s" for name, seconds in plan.phases.items()]),
        *(f"<p>note: {escape(note)}</p>" for note in plan.notes),
        f"<p>plan digest <code>{plan.digest}</code></p>",
    ]
    head = f'<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html>{head}<body>{''.join(parts)}</body></html>\n"


def _flow(plan: Plan) -> str:
    """Runs of like layers as one block each, in the order of the graph."""
    runs: list[tuple[str, list[Claim]]] = []
    for claim in plan.claims:
        pattern = f"{re.sub(r'[0-9]+', '*', claim.module)} {claim.op} {_kept(plan, claim)}"
        if not runs or runs[-1][0] != pattern:
            runs.append((pattern, []))
        runs[-1][1].append(claim)
    runs = _cycles(runs)
    ops = list(dict.fromkeys(claim.op for claim in plan.claims))
    pieces = ['<div class="end">token ids</div><div class="pipe"></div><div class="end">embedding</div>']
    for _, claims in runs:
        first, last = claims[0], claims[-1]
        hue = _HUES[ops.index(first.op) % len(_HUES)]
        kernel = next(
            (d.winner for d in plan.decisions if d.subject == first.op and (first.module in d.members or first.node in d.members)),
            "computes itself",
        )
        place = first.module if first is last else f"{first.module} … {last.module}"
        times = f'<span class="times">&times; {len(claims)}</span>' if len(claims) > 1 else ""
        tags = [first.op, f"kernel {kernel}", f"by {first.by}", *filter(None, [_kept(plan, first)])]
        shown = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)
        kind = escape(first.module_class.rpartition(".")[2] or first.op)
        pieces.append(
            f'<div class="pipe"></div><div class="block" style="--hue:{hue}">{times}<b>{kind}</b><br><code>{escape(place)}</code><br>{shown}</div>'
        )
    pieces.append('<div class="pipe"></div><div class="end">logits of the wanted rows</div>')
    return f'<div class="flow">{"".join(pieces)}</div>'


def _cycles(runs: list[tuple[str, list[Claim]]]) -> list[tuple[str, list[Claim]]]:
    """A pattern of a few runs that repeats (window, window, full, ...) is drawn once, with its number of layers."""
    for period in range(2, 9):
        if len(runs) >= 2 * period and all(runs[i][0] == runs[i % period][0] for i in range(len(runs))):
            return [(runs[i][0], [claim for run in runs[i::period] for claim in run[1]]) for i in range(period)]
    return runs


def _kept(plan: Plan, claim: Claim) -> str:
    """What the claim keeps between steps, in a few words."""
    own = [entry for entry in plan.resources if entry.node == claim.node]
    if not own:
        return next((f"shares the memory of {entry.node}" for entry in plan.resources if claim.node in entry.shared_by), "")
    unit = "token" if own[0].kind == "pages" else "sequence"
    window = f", window {own[0].window}" if own[0].window is not None else ""
    return f"{megabytes(sum(entry.unit_bytes for entry in own))} a {unit}{window}"


def _proportions(title: str, values: dict[str, int] | dict[str, float], words: list[str]) -> str:
    total = sum(values.values())
    if not total:
        return ""
    spans = "".join(
        f'<span style="width:{100 * value / total:.2f}%;background:{_HUES[index % len(_HUES)]}" title="{escape(name)}">'
        f"{escape(name)}</span>"
        for index, (name, value) in enumerate(values.items())
        if value / total > 0.004
    )
    return f'<h2>{title}</h2><div class="bar">{spans}</div><p>{escape(", ".join(words))}</p>'


def _table(columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td class=n>{cell}</td>' if isinstance(cell, int) else f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
