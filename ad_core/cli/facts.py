"""What both faces of a plan say of it: the printed one and the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ad_core.plan import PassEntry, Plan


def cache_bytes(plan: Plan, kind: str) -> int:
    """What all mixers together keep a token ("pages") or a sequence ("slots")."""
    return sum(entry.unit_bytes // entry.every for entry in plan.resources if entry.kind == kind)


def pass_notes(entry: PassEntry) -> list[str]:
    """What a pass has to say, the first of many."""
    said = [*entry.notes[:2], *(f"declined: {reason}" for reason in entry.declined[:2])]
    said += [f"and {len(entry.declined) - 2} more declined"] if len(entry.declined) > 2 else []
    return said + ([f"guard: {entry.guard}"] if entry.guard not in ("", "off") else [])


def idle_passes(plan: Plan) -> list[str]:
    """Names of passes that found nothing and have nothing to say."""
    return [entry.name for entry in plan.passes if not entry.matched and not pass_notes(entry)]
