"""`ad explain`: what was captured, which kernels run and why. Prints the plan, and decides nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ad_core.cli import options
from ad_core.progress import megabytes, memory_words

if TYPE_CHECKING:
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
    """The plan as tables on the terminal."""
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{headline(plan)}[/bold]")
    for attempt in plan.attempts:
        console.print(f"  {'captured' if attempt.accepted else 'refused '} by {attempt.way}: {attempt.reason}", highlight=False)
    for table in (_claims(plan), _kernels(plan), _resources(plan), _passes(plan)):
        console.print()
        console.print(table)
    if plan.memory:
        console.print(f"\nmemory: {', '.join(memory_words(plan.memory))}", highlight=False)
    if plan.phases:
        console.print(f"start: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in plan.phases.items())}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"plan digest {plan.digest}", style="dim", highlight=False)


def headline(plan: Plan) -> str:
    """The model in one line."""
    model = plan.model
    return (
        f"{model['name']}: {model['architecture']}, {model['parameters'] / 1e6:,.0f} M parameters, {model['dtype']}, "
        f"{megabytes(model['weight_bytes'])} of weights, up to {model['max_model_len']} tokens"
    )


def claim_rows(plan: Plan) -> list[tuple[str, str, str, str, int]]:
    """(layers, class, op, by, count), like layers together."""
    import re

    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for claim in plan.claims:
        key = (re.sub(r"\d+", "*", claim.module), claim.module_class.rpartition(".")[2], claim.op, claim.by)
        groups.setdefault(key, []).append(claim.module)
    return [(pattern, kind, op, by, len(members)) for (pattern, kind, op, by), members in groups.items()]


def resource_rows(plan: Plan) -> list[tuple[str, str, str, int, str, int]]:
    """(name, kind, shape and dtype, count, window, bytes of one unit over all), like resources together."""
    counts: Counter[tuple[str, str, str, str, int]] = Counter()
    for entry in plan.resources:
        shape = f"[{', '.join(map(str, entry.shape))}] {entry.dtype}"
        counts[entry.name, entry.kind, shape, "all" if entry.window is None else str(entry.window), entry.unit_bytes] += 1
    return [(name, kind, shape, count, window, unit * count) for (name, kind, shape, window, unit), count in counts.items()]


def _claims(plan: Plan) -> Table:
    table = _table("captured", "layers", "class", "canonical op", "claimed by", "count")
    for pattern, kind, op, by, count in claim_rows(plan):
        table.add_row(pattern, kind, op, by, str(count))
    return table


def _kernels(plan: Plan) -> Table:
    table = _table("decisions", "for", "winner", "rule", "places", "why not the others")
    for decision in plan.decisions:
        losers = "\n".join(f"{name}: {reason}" for name, reason in decision.losers.items())
        table.add_row(decision.subject, decision.winner, decision.rule, str(len(decision.members)), losers)
    return table


def _resources(plan: Plan) -> Table:
    table = _table("kept between steps", "resource", "kind", "one entry", "count", "reads back", "bytes")
    for name, kind, shape, count, window, size in resource_rows(plan):
        table.add_row(name, kind, shape, str(count), window, f"{megabytes(size)} a {'token' if kind == 'pages' else 'sequence'}")
    return table


def _passes(plan: Plan) -> Table:
    table = _table("passes", "pass", "stage", "from", "matches", "ms", "notes")
    for entry in plan.passes:
        said = [*entry.notes[:2], *(f"declined: {reason}" for reason in entry.declined[:2])]
        said += [f"and {len(entry.declined) - 2} more declined"] if len(entry.declined) > 2 else []
        said += [f"guard: {entry.guard}"] if entry.guard not in ("", "off") else []
        table.add_row(entry.name, entry.stage, entry.distribution, str(entry.matched), f"{entry.seconds * 1e3:.0f}", "\n".join(said))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table: Any = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("count", "places", "matches", "ms") else "left", overflow="fold")
    return table
