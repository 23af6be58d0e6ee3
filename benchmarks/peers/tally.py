"""From samples to rows: medians with their range, and ratios taken inside each round.

Two engines are compared by the median of their per-round ratios, never by the ratio of their medians: rounds on a shared machine
differ more than engines do, and inside a round both saw the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

OURS = "ours"


@dataclass(frozen=True)
class Case:
    """One thing that is measured. `faster` says which way is better."""

    name: str
    title: str
    metric: str
    unit: str
    faster: str
    """"higher" for rates, "lower" for times and bytes."""


CASES = (
    Case("decode", "decode, one request", "output rate", "tokens/s", "higher"),
    Case("concurrent", "16 requests at once, 128 in, 128 out", "output rate with prefill", "tokens/s", "higher"),
    Case("prefill", "prefill of 512 tokens", "prompt rate", "tokens/s", "higher"),
    Case("cold", "cold start to first token", "wall time", "s", "lower"),
    Case("memory", "peak memory of the process", "resident", "MB", "lower"),
)
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Sample:
    """One measurement of one engine in one round."""

    case: str
    threads: int
    engine: str
    round: int
    value: float


@dataclass(frozen=True)
class Target:
    """What an issue asks for: our speed against `peer` at least `limit`, or, without a peer, our value at most `limit`."""

    case: str
    threads: int
    limit: float
    peer: str | None = None


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least, most and how many."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row for each case, thread count and engine, in the order of CASES; `ours_speedup` on every row but ours."""
    result = []
    for case in CASES:
        of_case = [sample for sample in samples if sample.case == case.name]
        for threads, engine in dict.fromkeys((sample.threads, sample.engine) for sample in of_case):
            chosen = {s.round: s.value for s in of_case if (s.threads, s.engine) == (threads, engine)}
            row: dict[str, Any] = {
                "case": case.name,
                "threads": threads,
                "engine": engine,
                "metric": case.metric,
                "unit": case.unit,
                **spread(list(chosen.values())),
            }
            ours = {s.round: s.value for s in of_case if (s.threads, s.engine) == (threads, OURS)}
            if engine != OURS and (both := sorted(ours.keys() & chosen.keys())):
                row["ours_speedup"] = spread([_speedup(case, ours[number], chosen[number]) for number in both])
            result.append(row)
    return result


def _speedup(case: Case, ours: float, theirs: float) -> float:
    """How many times better ours is: over 1 is good whichever way the metric runs."""
    return ours / theirs if case.faster == "higher" else theirs / ours


def judge(target: Target, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The target with its value and `passed`: True, False, or None when it was not measured."""
    engine = target.peer or OURS
    row = next((r for r in measured if (r["case"], r["threads"], r["engine"]) == (target.case, target.threads, engine)), None)
    value: float | None = None
    passed: bool | None = None
    if target.peer and row and "ours_speedup" in row:
        value = row["ours_speedup"]["median"]
        passed = value >= target.limit
    elif not target.peer and row:
        value = row["median"]
        passed = value <= target.limit
    wish = f">= {target.limit:g}x {target.peer}" if target.peer else f"<= {target.limit:g} {BY_NAME[target.case].unit}"
    return {"case": target.case, "threads": target.threads, "wish": wish, "value": value, "passed": passed}


def agreement(answers: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[int]]:
    """For each engine and prompt, how many leading tokens equal those of the first engine given."""
    reference = next(iter(answers.values()))
    return {engine: [_common(mine, theirs) for mine, theirs in zip(reference, given, strict=True)] for engine, given in answers.items()}


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
