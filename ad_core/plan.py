"""The plan: the record of every decision between the author's module and the engine. `ad explain` only prints it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """One way of capture that was tried. `reason` says why it was refused, or how it was verified."""

    way: str
    accepted: bool
    reason: str


@dataclass(frozen=True)
class Claim:
    """A canonical op in the graph: whose code it stands for and what put it there ("seam hf.attention", "matcher ...", "annotated")."""

    node: str
    module: str
    module_class: str
    op: str
    by: str


@dataclass(frozen=True)
class Decision:
    """An arbitration: `winner` by `rule`, and every loser with its reason."""

    subject: str
    winner: str
    rule: str
    losers: Mapping[str, str] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    """Nodes that the decision covers."""


@dataclass(frozen=True)
class ResourceEntry:
    """Memory that one claim keeps: `kind` is "pages" or "slots"; `unit_bytes` an entry's or a sequence's share, `every` the tokens that an
    entry stands for."""

    name: str
    node: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    unit_bytes: int
    window: int | None = None
    shared_by: tuple[str, ...] = ()
    every: int = 1


@dataclass(frozen=True)
class PassEntry:
    """A pass that ran (or was skipped, with the reason in `notes`)."""

    name: str
    stage: str
    distribution: str
    matched: int
    declined: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    guard: str = ""
    """What the numeric guard found: a difference, or why it is inert."""


@dataclass
class Plan:
    """Filled while the pipeline runs. Everything is plain data: no torch, no graph."""

    model: dict[str, Any] = field(default_factory=dict)
    plugins: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    resources: list[ResourceEntry] = field(default_factory=list)
    passes: list[PassEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is inert or degraded, and why."""
    memory: dict[str, int] = field(default_factory=dict)
    """The ledger, in bytes: weights, pools, workspace ..."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase of the start."""
    nodes: int = 0
    """Nodes of the cached graph, before it is compiled."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase of the start; a name used twice adds up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**asdict(self), "digest": self.digest}

    @property
    def digest(self) -> str:
        """Equal digests: the same model was captured, claimed and rewritten in the same way (times left out)."""
        parts = {
            "model": self.model,
            "claims": [asdict(claim) for claim in self.claims],
            "decisions": [asdict(decision) for decision in self.decisions],
            "resources": [asdict(resource) for resource in self.resources],
            "passes": [(entry.name, entry.matched) for entry in self.passes],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
