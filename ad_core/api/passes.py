"""A pass: one rewrite of the graph, with a stage and a declared order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ad_core.api.types import Safety, Stage

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule


@dataclass
class PassReport:
    """What a pass did. `declined` holds a reason for each place that it looked at and left. Seconds are filled by the core."""

    matched: int = 0
    declined: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the graph. `options` is its plugin's section of the configuration."""

    device: torch.device
    dtype: torch.dtype | None
    options: Mapping[str, Any] = field(default_factory=dict)


class Pass(ABC):
    """Rewrites the graph in place.

    `before` and `after` order passes of one stage and name other passes; a name that is not installed is ignored.
    `requires` must be there and run earlier; `conflicts` must not. `requires_ops` skips the pass when none is in the graph.
    """

    name: str
    stage: Stage
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    requires_ops: tuple[str, ...] = ()
    safety: Safety = "exact"

    @abstractmethod
    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        """Rewrites `graph` and says what it did."""
