"""Finding what moves information between tokens: follow the token axis from the inputs through the graph.

Every value gets the set of axes along which its tokens lie (see `Axis`): none for a weight, one for the usual activation, two
for scores or a mask [S, S]. The table (`token_rules`) proves most ops; the rest is tried out (`probe`). A node that mixes
opens a *region*, the nodes from it to a place that every path from it passes. If the region as a whole keeps tokens apart
(tokens sorted by expert and put back) all is well; else it is reported, unless it is one of the claimed canonical ops.

Values made of positions and lengths alone (masks, rotary tables) are followed too. Mixing among them, values [S, S] and
positions that the model counts itself are reported only if they reach the output other than through something reported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch.fx import GraphModule, Node

from ad_core.api.errors import GraphInvalidError
from ad_core.graph.axes import TOKEN_INPUTS, Axis, Sizes, UnknownSize
from ad_core.graph.calls import module_class, module_path
from ad_core.graph.dominance import immediate_post_dominators
from ad_core.graph.edit import live_nodes, mutates, output_node
from ad_core.graph.ops import qualified_name
from ad_core.graph.probe import Probe
from ad_core.graph.token_rules import NOTHING, UNKNOWN, Call, Mixes, judge

REGION_NODES = 512
"""A region never grows past this many nodes."""
REGION_EXITS = 4
"""How many of its exits are looked at: places that every path passes and that have one token axis by their shape."""

Axes = frozenset[Axis]
_NONE: Axes = frozenset()


@dataclass(frozen=True)
class MixingNode:
    """A place where tokens mix and that nothing claims. `source` is "file.py:line" of the author's code, or ""."""

    node: Node
    module: str
    module_class: str
    op: str
    source: str
    reason: str


class _Reads(IntEnum):
    """What a value is made of."""

    CONSTANTS = 0
    POSITIONS = 1
    DATA = 2


def find_mixing(graph: GraphModule, claimed: Iterable[str] = ()) -> list[MixingNode]:
    """Every unclaimed place where tokens mix, in graph order. `claimed` are names of canonical ops ("ad_toy::mix").

    The graph is not changed. Runs regions on the CPU with made-up numbers, so weights may be on meta. Raises
    `GraphInvalidError` if the graph has no token input with a symbolic length, or writes to a value in place: what is written
    cannot be followed from node to node.
    """
    written = next((node for node in graph.graph.nodes if mutates(node)), None)
    if written is not None:
        raise GraphInvalidError(
            f"{written.format_node()} writes to one of its arguments", where=module_path(written), hint="run the clean-up passes first"
        )
    return _Search(graph, frozenset(claimed)).found()


class _Search:
    def __init__(self, graph: GraphModule, claimed: frozenset[str]):
        self._claimed = claimed
        self._sizes = Sizes(graph)
        self._probe = Probe(graph, self._sizes)
        live = live_nodes(graph.graph)
        self._order = [node for node in graph.graph.nodes if node in live]
        self._place = {node: index for index, node in enumerate(self._order)}
        self._exit_of = immediate_post_dominators(self._order)
        self._axes: dict[Node, Axes] = {}
        self._reads: dict[Node, _Reads] = {}
        self._inside: set[Node] = set()
        """Nodes inside a region, decided by its exit."""
        self._open: set[Node] = set()
        self._reported: dict[Node, str] = {}
        self._suspects: dict[Node, str] = {}
        self._output = output_node(graph.graph)

    def found(self) -> list[MixingNode]:
        for node in self._order:
            self._settle(node)
        places = dict(self._reported)
        places |= {node: reason for node, reason in self._suspects.items() if self._escapes(node)}
        return [_mixing_node(node, places[node]) for node in self._order if node in places]

    # -- one node ---------------------------------------------------------------------------------------------------------

    def _settle(self, node: Node) -> None:
        """Decides the node's axes, and before it whatever it needs."""
        if node in self._axes or node in self._inside or node in self._open:
            return
        self._reads[node] = self._reads_of(node)
        if node.op == "placeholder":
            self._axes[node] = frozenset([Axis(1)]) if node.target in TOKEN_INPUTS else self._sizes.axes_by_shape(node.meta.get("val"))
        elif node.op in ("get_attr", "output"):
            self._axes[node] = _NONE
        elif qualified_name(node.target) in self._claimed:
            self._axes[node] = self._claimed_axes(node)
        else:
            self._settle_call(node)

    def _settle_call(self, node: Node) -> None:
        value = node.meta.get("val")
        if value is None or qualified_name(node.target) in ("aten::sym_size", "aten::sym_numel", "aten::sym_stride"):
            self._axes[node] = _NONE
            return
        call = Call(node, self._sizes)
        try:
            outcome = self._outcome(call)
        except UnknownSize as error:
            outcome = Mixes(f"has a size that depends on data ({error})")
        if isinstance(outcome, frozenset):
            self._axes[node] = outcome
        elif self._reads[node] is _Reads.DATA:
            self._resolve_region(node, outcome.reason)
        else:
            self._suspects[node] = f"{outcome.reason}, in values made of positions"
            self._axes[node] = self._sizes.axes_by_shape(value)

    def _outcome(self, call: Call) -> Axes | Mixes:
        node = call.node
        carriers = [(name, parent, axis) for name, parent in call.tensors() for axis in self._axes.get(parent, _NONE)]
        if not carriers:
            return self._made_from_sizes(call)
        if not _is_tensor(node):
            return Mixes("reads a number out of the tokens")
        if self._counts_with_length(call):
            self._suspects[node] = "computes with the number of tokens"
        found: set[Axis] = set()
        for name, parent, axis in carriers:
            outcome = judge(call, name, parent, axis)
            if isinstance(outcome, Mixes):
                return outcome
            if outcome is UNKNOWN:
                return self._tried(node)
            if outcome is not NOTHING and isinstance(outcome, Axis):
                found.add(outcome)
        if len(found) > 1:
            if self._reads[node] is _Reads.DATA:
                return Mixes("relates every token to every other: its tokens lie along two dimensions")
            self._suspect_square(node)
        return frozenset(found)

    def _tried(self, node: Node) -> Axes | Mixes:
        (verdict,) = self._probe.try_region([node], [node], self._axes_of)
        if verdict.mixes is not None:
            return Mixes(verdict.mixes)
        return frozenset([verdict.axis]) if verdict.axis is not None else _NONE

    def _claimed_axes(self, node: Node) -> Axes:
        by_shape = self._sizes.axes_by_shape(_first_tensor(node))
        return frozenset([Axis(1)]) if Axis(1) in by_shape else by_shape

    # -- values made of sizes and weights -----------------------------------------------------------------------------------

    def _made_from_sizes(self, call: Call) -> Axes | Mixes:
        """A value without tokens may still have one entry a token: constant along them (ones, an expanded weight), which is
        harmless, or not (arange, a weight cut to the length), which are positions of the model's own making."""
        node = call.node
        if not _is_tensor(node) or not self._made_from_length(node):
            return _NONE
        value = _first_tensor(node)
        dims = self._sizes.length_dims(value)
        if not dims:
            if not self._same_at_other_length(node):
                self._suspects[node] = "depends on the number of tokens"
            return _NONE
        try:
            made = self._probe.evaluate(node)
        except Exception:  # any op may raise anything; what cannot be evaluated counts as varying
            varying = dims
        else:
            made = made[0] if isinstance(made, list | tuple) else made
            varying = tuple(dim for dim in dims if not torch.equal(made, made.narrow(dim, 0, 1).expand_as(made)))
        axes = frozenset(axis for axis in self._sizes.axes_by_shape(value) if axis.dim in varying)
        if varying:
            self._reads[node] = _Reads.POSITIONS
            self._suspects[node] = "positions that the model counts itself"
        if len(axes) > 1:
            self._suspect_square(node)
        return axes

    def _made_from_length(self, node: Node) -> bool:
        """Whether the length enters the node's value, by its shape or by a number above it that depends on it."""
        if self._sizes.length_dims(_first_tensor(node)):
            return True
        return any(
            self._sizes.carries_length(parent.meta.get("val")) or self._sizes.length_dims(parent.meta.get("val"))
            for parent in node.all_input_nodes
        )

    def _same_at_other_length(self, node: Node) -> bool:
        try:
            here, there = self._probe.evaluate(node), self._probe.evaluate(node, self._sizes.other_length())
        except Exception:  # as above: not evaluated, not the same
            return False
        return isinstance(here, torch.Tensor) and here.shape == there.shape and torch.equal(here, there)

    def _counts_with_length(self, call: Call) -> bool:
        """Whether a number that depends on the length is an operand, rather than a size."""
        if not hasattr(call.node.target, "_schema"):
            return False
        kinds = {argument.name: str(argument.type) for argument in call.node.target._schema.arguments}
        return any(
            isinstance(value, Node)
            and not _is_tensor(value)
            and self._sizes.carries_length(value.meta.get("val"))
            and kinds[name] in ("Tensor", "number")
            for name, value in call.arguments.items()
        )

    def _suspect_square(self, node: Node) -> None:
        self._suspects[node] = "its shape holds the length twice"

    # -- regions ------------------------------------------------------------------------------------------------------------

    def _resolve_region(self, origin: Node, reason: str) -> None:
        """Looks for an exit where tokens are apart again. Reports `origin` if there is none."""
        self._open.add(origin)
        exits = self._exits(origin)
        apart = self._tried_exits(origin, exits)
        if apart is None:
            self._reported[origin] = reason
        exit_ = apart[0] if apart is not None else next(iter(exits), None)
        if exit_ is None:
            self._axes[origin] = (
                self._sizes.axes_by_shape(_first_tensor(origin)) if len(self._sizes.length_dims(_first_tensor(origin))) == 1 else _NONE
            )
        else:
            self._inside |= self._between(origin, exit_)
            self._axes[exit_] = apart[1] if apart is not None else self._sizes.axes_by_shape(_first_tensor(exit_))
            self._reads[exit_] = _Reads.DATA
        self._open.discard(origin)

    def _exits(self, origin: Node) -> list[Node]:
        """Nodes that every path from `origin` passes, nearest first, whose shape has exactly one token axis."""
        found: list[Node] = []
        node: Node | None = origin
        while node is not None and node is not self._output and len(found) < REGION_EXITS:
            if self._place[node] - self._place[origin] > REGION_NODES or (node is not origin and self._crosses_claimed(origin, node)):
                break
            if node.target is not operator.getitem and len(self._sizes.axes_by_shape(node.meta.get("val"))) == 1:
                found.append(node)
            node = self._exit_of.get(node)
        return found

    def _tried_exits(self, origin: Node, exits: list[Node]) -> tuple[Node, Axes] | None:
        if not exits:
            return None
        region = self._between(origin, exits[-1]) | {exits[-1]}
        for entry in {parent for node in region for parent in node.all_input_nodes} - region:
            for node in self._above(entry):
                self._settle(node)
        verdicts = self._probe.try_region([node for node in self._order if node in region], exits, self._axes_of)
        if exits[0] is origin and verdicts[0].counted:  # what comes after it reacts to other things, and hides this
            return None
        for node, verdict in zip(exits, verdicts, strict=True):
            if verdict.mixes is None:
                return node, frozenset([verdict.axis]) if verdict.axis is not None else _NONE
        return None

    def _between(self, origin: Node, exit_: Node) -> set[Node]:
        """`origin` and what follows from it before `exit_`: as every path passes the exit, all of it belongs to the region."""
        if origin is exit_:
            return set()
        region = {origin}
        for node in self._order[self._place[origin] + 1 : self._place[exit_]]:
            if any(parent in region for parent in node.all_input_nodes):
                region.add(node)
        return region

    def _crosses_claimed(self, origin: Node, exit_: Node) -> bool:
        return any(qualified_name(node.target) in self._claimed for node in self._between(origin, exit_) | {exit_})

    def _above(self, node: Node) -> list[Node]:
        """The node and what it needs and is not settled, in graph order."""
        found: set[Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current not in found and current not in self._axes and current not in self._inside:
                found.add(current)
                pending += current.all_input_nodes
        return sorted(found, key=self._place.__getitem__)

    def _axes_of(self, node: Node) -> Axes:
        if node in self._axes:
            return self._axes[node]
        return self._sizes.axes_by_shape(_first_tensor(node))

    # -- what a value is made of, and where it goes -----------------------------------------------------------------------------

    def _reads_of(self, node: Node) -> _Reads:
        if node.op == "placeholder":
            return _Reads.POSITIONS if node.target == "position_ids" else _Reads.DATA
        if not _is_tensor(node) and not isinstance(node.meta.get("val"), list | tuple):
            return _Reads.CONSTANTS
        return max((self._reads.get(parent, _Reads.DATA) for parent in node.all_input_nodes), default=_Reads.CONSTANTS)

    def _escapes(self, node: Node) -> bool:
        """Whether the node reaches the output other than through a reported place or the inside of a region."""
        seen: set[Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current is self._output:
                return True
            if (
                current in seen
                or current in self._reported
                or current in self._inside
                or (current is not node and current in self._suspects)
            ):
                continue
            seen.add(current)
            pending += [user for user in current.users if user in self._place]
        return False


def _mixing_node(node: Node, reason: str) -> MixingNode:
    op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", str(node.target))
    return MixingNode(node, module_path(node), module_class(node), op, source_of(node), reason)


def source_of(node: Node) -> str:
    """ "modeling_x.py:512" of the innermost line of the author's code, torch's own left out, or ""."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    for line in reversed(lines):
        path, _, rest = line.removeprefix('File "').partition('", line ')
        if "torch" not in Path(path).parts:
            return f"{Path(path).name}:{rest.split(',')[0].strip()}"
    return ""


def _is_tensor(node: Node) -> bool:
    return isinstance(_first_tensor(node), torch.Tensor)


def _first_tensor(node: Node) -> object:
    value = node.meta.get("val")
    return value[0] if isinstance(value, list | tuple) and value else value


__all__ = ["MixingNode", "find_mixing", "source_of"]
