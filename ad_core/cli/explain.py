"""`ad explain`: what was captured, which kernels run and why. Prints the plan, and decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ad_core.cli import options
from ad_core.cli.facts import cache_bytes, idle_passes, pass_notes
from ad_core.cli.kinds import kinds, places
from ad_core.progress import megabytes, memory_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ad_core.plan import Plan


def explain(
    model: options.Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the model as a picture for a browser.")] = None,
    load: Annotated[bool, typer.Option("--load", help="Load the weights too: compares numbers and measures memory.")] = False,
    config: options.Config = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    memory: options.Memory = None,
    settings: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Show what claims each layer, the kernels with reasons, resources and bytes, passes with matches and time."""
    from ad_core.config import load_config
    from ad_core.pipeline import build, outline

    overrides = options.llm_options(config, device, dtype, threads, memory, settings, trust_remote_code)
    engine_config = load_config(overrides.pop("config"), overrides)
    plan = build(model, engine_config).plan if load else outline(model, engine_config)
    if html is not None:
        from ad_core.cli.picture import picture

        html.write_text(picture(plan), encoding="utf-8")
    if as_json:
        import json

        print(json.dumps(plan.to_dict(), indent=2, default=str))
    else:
        print_plan(plan)
        if html is not None:
            print(f"the picture is in {html}")


def print_plan(plan: Plan) -> None:
    """The plan on the terminal, at any width: names stay whole, and long lines go on under their own beginning."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(headline(plan), style="bold")
    _lines(console, [("captured" if a.accepted else "refused", f"by {a.way}: {a.reason}") for a in plan.attempts])
    for kind in kinds(plan):
        console.print()
        console.print(f"{len(kind.claims)} x {kind.label}", style="bold")
        losers = kind.decision.losers.items() if kind.decision else ()
        _lines(
            console,
            [
                ("where", places([claim.module or claim.node for claim in kind.claims])),
                ("op", f"{kind.op}, by {kind.by}"),
                ("kernel", kind.kernel),
                *(("", f"not {name}: {reason}") for name, reason in losers),
                *((("keeps" if not index else ""), line) for index, line in enumerate(kind.keeps)),
            ],
        )
    kept = [(cache_bytes(plan, "pages"), "token"), (cache_bytes(plan, "slots"), "sequence")]
    if words := " and ".join(f"{megabytes(size)} a {unit}" for size, unit in kept if size):
        console.print(f"\nTogether they keep {words}.")
    console.print()
    console.print(_passes(plan))
    if idle := idle_passes(plan):
        _lines(console, [("idle", ", ".join(idle))])
    if plan.memory:
        _lines(console, [("memory", ", ".join(memory_words(plan.memory)))])
    if plan.phases:
        _lines(console, [("start", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in plan.phases.items()))])
    _lines(console, [*(("note", note) for note in plan.notes), ("digest", plan.digest)])


def headline(plan: Plan) -> str:
    """The model in one line."""
    model = plan.model
    return (
        f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:,.0f} M parameters, {model['dtype']}, "
        f"{megabytes(model['weight_bytes'])} of weights, up to {model['max_model_len']} tokens"
    )


def _lines(console: Console, lines: list[tuple[str, str]]) -> None:
    """A word and what it says, which wraps under itself."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=10)
    grid.add_column(overflow="fold")
    for word, text in lines:
        grid.add_row(f"  {word}", text)
    console.print(grid)


def _passes(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for name, justify in (("pass", "left"), ("stage", "left"), ("matches", "right"), ("ms", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("notes", overflow="fold")
    idle = set(idle_passes(plan))
    for entry in plan.passes:
        if entry.name not in idle:
            owner = [] if entry.distribution == "ad-core" else [f"of {entry.distribution}"]
            notes = "\n".join([*owner, *pass_notes(entry)])
            table.add_row(entry.name, entry.stage, str(entry.matched), f"{entry.seconds * 1e3:.0f}", notes)
    return table
