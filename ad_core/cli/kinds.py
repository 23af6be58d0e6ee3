"""A plan's claims, those that are alike together: what `ad explain` shows as one thing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ad_core.progress import megabytes

if TYPE_CHECKING:
    from ad_core.plan import Claim, Decision, Plan, ResourceEntry


@dataclass(frozen=True)
class Kind:
    """Claims with one class, op, claimant, kernel and memory, in the order of the graph.

    `kept` is what each of them keeps; empty if that belongs to another node, whose module `shares` then names as a pattern.
    """

    label: str
    op: str
    by: str
    decision: Decision | None
    kept: tuple[ResourceEntry, ...]
    shares: str
    claims: list[Claim] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        return "none, the canonical op computes itself" if self.decision is None else f"{self.decision.winner} ({self.decision.rule})"

    @property
    def window(self) -> int | None:
        return next((entry.window for entry in self.kept if entry.window is not None), None)

    @property
    def keeps(self) -> list[str]:
        """One line a resource: what one place keeps."""
        if self.shares:
            return [f"nothing of its own: reads what {self.shares} keeps"]
        lines = []
        for entry in self.kept:
            unit = "a sequence" if entry.kind == "slots" else "a token" if entry.every == 1 else f"every {entry.every} tokens"
            window = "" if entry.window is None else f", of the last {entry.window} tokens"
            shape = ", ".join(map(str, entry.shape))
            lines.append(f"{entry.name} [{shape}] {entry.dtype}, {megabytes(entry.unit_bytes)} {unit}{window}")
        return lines or ["nothing"]


def kinds(plan: Plan) -> list[Kind]:
    """By first appearance in the graph."""
    modules = {claim.node: claim.module or claim.node for claim in plan.claims}
    owned: dict[str, list[ResourceEntry]] = {}
    lender: dict[str, str] = {}
    for entry in plan.resources:
        owned.setdefault(entry.node, []).append(entry)
        lender |= dict.fromkeys(entry.shared_by, modules.get(entry.node, entry.node))
    decided: dict[tuple[str, str], Decision] = {}
    for decision in plan.decisions:
        for member in decision.members:
            decided.setdefault((decision.subject, member), decision)
    found: dict[object, Kind] = {}
    for claim in plan.claims:
        label = claim.module_class.rpartition(".")[2] or claim.op
        won = decided.get((claim.op, claim.module)) or decided.get((claim.op, claim.node))
        kept = tuple(owned.get(claim.node, ()))
        shares = _pattern(lender.get(claim.node, ""))
        memory = tuple((e.name, e.kind, e.shape, e.dtype, e.window) for e in kept)
        key = (label, claim.op, claim.by, id(won), memory, shares)
        found.setdefault(key, Kind(label, claim.op, claim.by, won, kept, shares)).claims.append(claim)
    return list(found.values())


def places(modules: Sequence[str]) -> str:
    """Module paths in few words: "model.layers.{0-2, 4-6}.mixer"."""
    split = [re.split(r"(\d+)", module) for module in modules]
    parts = [sorted({*column}, key=column.index) for column in zip(*split, strict=False)] if len({len(s) for s in split}) == 1 else []
    varying = [index for index, column in enumerate(parts) if len(column) > 1]
    if not parts or len(varying) > 1 or any(index % 2 == 0 for index in varying):
        return modules[0] if len(modules) == 1 else f"{modules[0]} to {modules[-1]}"
    shown = [column[0] if len(column) == 1 else f"{{{_ranges([int(number) for number in column])}}}" for column in parts]
    return "".join(shown)


def layers(plan: Plan, found: Sequence[Kind]) -> list[tuple[str, list[int]]]:
    """(number of the layer, indices of the kinds in it), in the order of the graph. A claim outside of layers is one by itself."""
    kind_of = {claim.node: index for index, kind in enumerate(found) for claim in kind.claims}
    columns: list[tuple[str, list[int]]] = []
    last = None
    for claim in plan.claims:
        match = re.match(r".*?(?:^|\.)(\d+)(?=\.|$)", claim.module)
        here = match[0] if match else claim.node
        if here != last:
            columns.append((match[1] if match else "", []))
            last = here
        columns[-1][1].append(kind_of[claim.node])
    return columns


def _pattern(module: str) -> str:
    return re.sub(r"\d+", "*", module)


def _ranges(numbers: Sequence[int]) -> str:
    """0-2, 4-6; when that gets long, how it begins and ends."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(words if len(words) <= 6 else [*words[:3], "...", words[-1]])
