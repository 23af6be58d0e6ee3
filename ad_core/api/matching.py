"""How a canonical op is found: a seam puts it in while exporting, a matcher finds it in the exported graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ad_core.api.types import Declined

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import GraphModule, Node


class Seam(ABC):
    """A place where the author's library lets a canonical op be put in without matching.

    Everything a seam changes is changed while its context is open and put back when it closes.
    """

    name: str
    produces: str
    """The canonical op: "ad_toy::mix"."""
    transformers: str = ">=5.17"
    """Versions for which it is known to hold. Outside, it is not used, and `ad doctor` reports it."""

    @abstractmethod
    def applies(self, module: nn.Module) -> Declined | None:
        """None if the seam reaches this module."""

    @abstractmethod
    def open(self, module: nn.Module, entered: Callable[[str], None]) -> AbstractContextManager[None]:
        """While open, the module's forward calls the canonical op. `entered(op)` is called each time that happens: the
        capture verifier holds that count against the ops in the graph."""


@dataclass(frozen=True)
class Proposal:
    """A matcher's offer: `nodes` compute what the canonical op computes, `output` is the last of them.

    `arguments` are the canonical op's arguments by name: nodes outside `nodes`, or constants. `rewrite` builds the value
    that takes the place of `output` from the canonical op's node (a transpose, say), or is None if they are equal.
    Only the winner of the arbitration between proposals is written into the graph, by the core.
    """

    output: Node
    nodes: frozenset[Node]
    arguments: Mapping[str, Any] = field(hash=False)
    prepare: Callable[[GraphModule], Mapping[str, Any]] | None = None
    """Builds arguments that need new nodes (a transpose of the query), inserted just before `output`. What it returns
    updates `arguments`."""
    rewrite: Callable[[GraphModule, Node], Node] | None = None


class Matcher(ABC):
    """Finds a canonical op in raw ATen nodes. Declining a near miss is a value with a reason, so that the plan can show it."""

    name: str
    produces: str
    """The canonical op, by name: the matcher's plugin need not own it."""
    priority: int = 0

    @abstractmethod
    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        """Looks and does not touch."""
