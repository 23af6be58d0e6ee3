"""A bias that every query has of its own for each distance: rows [B, H, S, E] that a gather spreads over the keys.

Not known by its spelling. Where the gather looks is evaluated, and so is what happens to its result on the way to the scores: at key j it
must be what query i has at i - j, and zero from distance E on. Then the rows are all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_attention.match import build
from ad_attention.match.axes import BATCH, FEATURE, HEADS, LENGTH, SEQUENCE, Layout, best, layouts_above
from ad_attention.match.contraction import layout_of
from ad_attention.match.evaluate import Evaluation, Sizes, Unknown, cone
from ad_attention.match.mask_classifier import integers_of
from ad_core.graph.edit import insert_call

aten = torch.ops.aten

LARGEST_EXTENT = 2048
"""Rows of more distances are not looked at: the evaluation needs a few matrices of twice as many rows and columns."""

BY_ROW = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.to.dtype,
        aten._to_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
    }
)
"""Ops that do the same to a row before and after it is spread, if another operand has one value a row."""


@dataclass(frozen=True)
class DistanceBias:
    """`side`, which is added to the scores, is what `gather` takes of `rows`, after the ops of `links`: each with the argument that it
    has from the one before. `cuts` are those that only put zeros where keys are too far away."""

    side: Node
    gather: Node
    links: tuple[tuple[Node, Node], ...]
    cuts: frozenset[Node]
    rows: Layout

    @property
    def source(self) -> Node:
        return self.rows.node

    @property
    def dependent(self) -> frozenset[Node]:
        """The nodes whose values follow from those of `source`."""
        return frozenset((self.gather, *(node for node, _ in self.links)))

    def without_cuts(self, values: torch.Tensor, evaluation: Evaluation) -> torch.Tensor:
        """What the side is if the gather gives `values` and nothing is cut."""
        given = {self.gather: values}
        for node, before in self.links:
            if node in self.cuts:
                given[node] = evaluation.over(given, self.dependent).value(before)
        value: torch.Tensor = evaluation.over(given, self.dependent).value(self.side)
        return value

    def tokens(self, end: Node, sizes: Sizes) -> Node:
        """[B, S, H, E], made before `end`."""
        kept = [(node, before) for node, before in self.links if node not in self.cuts]
        if not kept:
            layout = best(layouts_above(self.rows, sizes, repeats=False))
            assert layout is not None
            return build.tokens(end, layout, layout.node.meta["val"].dtype)
        last = self.source
        for node, before in kept:
            last = _copy(node, before, last, end)
        return build.tokens(end, Layout(last, self.rows.groups), last.meta["val"].dtype)


def _copy(node: Node, before: Node, by: Node, end: Node) -> Node:
    """The same op, made before `end`, that reads `by` in the place of `before`."""
    arguments: Any = torch.fx.node.map_arg((node.args, node.kwargs), lambda old: by if old is before else old)
    return insert_call(end, node.target, *arguments[0], **arguments[1])


def read_distance_bias(sides: Iterable[Node], heads: int, graph: GraphModule, sizes: Sizes) -> DistanceBias | None:
    """The one of `sides`, which are added to the scores of `heads` heads, that is such a bias; None if none comes from values of the model
    that are gathered over keys. Raises `Unknown` with the reason if one does and is something else."""
    small = Evaluation(graph, sizes, 2, 7)
    found = [(side, gather) for side in sides for gather in _gathers(side, sizes) if _is_of_the_model(gather, small)]
    if not found:
        return None
    if len(found) > 1:
        raise Unknown(f"its scores get more than one bias that is gathered: {', '.join(gather.name for _, gather in found)}")
    ((side, gather),) = found
    source: Node = gather.args[0]  # type: ignore[assignment]
    extent = source.meta["val"].shape[-1]
    if not isinstance(extent, int):
        raise Unknown(f"the bias {gather.name} is gathered from as many values as there are tokens")
    if extent > LARGEST_EXTENT:
        raise Unknown(f"the bias {gather.name} is of {extent} distances, more than are looked at ({LARGEST_EXTENT})")
    rows = layout_of(source, [*[HEADS] * (source.meta["val"].dim() - 2), SEQUENCE, FEATURE], sizes)
    if rows.permutation() != [0, 2, 1, 3] or rows.num_heads != heads:
        raise Unknown(f"the bias {gather.name} has rows {tuple(source.meta['val'].shape)} and not one for each query of {heads} heads")
    links = _links(side, gather)
    cuts = frozenset(node for node, before in links if not _is_by_row(node, before, sizes))
    bias = DistanceBias(side, gather, links, cuts, rows)
    longest = 2 * extent + 3
    for evaluation in (small, Evaluation(graph, sizes, 1, longest)):
        _prove(bias, extent, evaluation)
    index: Node = gather.args[2]  # type: ignore[assignment]
    places = [index, *(other for cut, before in links if cut in cuts for other in cut.all_input_nodes if other is not before)]
    beyond = [integer for integer in integers_of({node for place in places for node in cone(place)}, graph) if integer > longest]
    if beyond:
        raise Unknown(f"where the bias {gather.name} is gathered is computed with {beyond[0]}, and {longest} tokens are looked at")
    return bias


def _gathers(side: Node, sizes: Sizes) -> list[Node]:
    """The gathers along the last dimension that `side` comes from through values [..., S, S]."""
    found, stack, seen = [], [side], {side}
    while stack:
        node = stack.pop()
        if not _is_square(node, sizes):
            continue
        if node.target is aten.gather.default:
            if node.args[1] in (-1, node.meta["val"].dim() - 1):
                found.append(node)
            continue
        fresh = [needed for needed in node.all_input_nodes if needed not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _is_of_the_model(gather: Node, evaluation: Evaluation) -> bool:
    """Whether the values that are gathered depend on more than sizes and positions."""
    try:
        evaluation.value(gather.args[0])  # type: ignore[arg-type]
    except Unknown:
        return True
    return False


def _is_square(node: Node, sizes: Sizes) -> bool:
    try:
        return sizes.shape(node, BATCH, LENGTH)[-2:] == (LENGTH, LENGTH)
    except Unknown:
        return False


def _links(side: Node, gather: Node) -> tuple[tuple[Node, Node], ...]:
    """The ops from behind `gather` to `side`, each with its argument among them. Raises `Unknown` if they are no chain."""
    links: list[tuple[Node, Node]] = []
    last = gather
    while last is not side:
        users = list(last.users)
        if len(users) != 1 or users[0].op != "call_function":
            raise Unknown(
                f"the bias {last.name} is read by {', '.join(user.name for user in users)} and not by one op on its way to the scores"
            )
        links.append((users[0], last))
        last = users[0]
    return tuple(links)


def _is_by_row(node: Node, before: Node, sizes: Sizes) -> bool:
    """Whether the op does the same to all values of a row. Raises `Unknown` if it may do anything to them."""
    others = [needed for needed in node.all_input_nodes if needed is not before]
    if any(_is_square(other, sizes) for other in others):
        return False
    dividend = node.target not in (aten.div.Tensor, aten.div.Scalar) or node.args[0] is before
    one_a_row = all(sizes.shape(other, BATCH, LENGTH)[-1:] in ((), (1,)) for other in others)
    if node.target not in BY_ROW or not dividend or not one_a_row:
        raise Unknown(f"the bias {before.name} goes through {node.name} ({node.target}) on its way to the scores")
    return True


def _prove(bias: DistanceBias, extent: int, evaluation: Evaluation) -> None:
    """Raises `Unknown` unless query i gets its own value for i - j at key j, and zero where there is none."""
    length = evaluation.length
    steps = torch.arange(length)
    distance = steps[:, None] - steps
    near, far = (distance >= 0) & (distance < extent), distance >= extent
    index: torch.Tensor = evaluation.value(bias.gather.args[2])  # type: ignore[arg-type]
    first = index[(0,) * (index.dim() - 2)]
    expanded = all(size == 1 or stride == 0 for size, stride in zip(index.shape[:-2], index.stride()[:-2], strict=True))
    if not (expanded or bool((index == first).all())) or not torch.equal(first[near], distance[near]):
        raise Unknown(f"the bias {bias.gather.name} is not gathered by the distance of query and key")
    spread = torch.randn(1, 1, length, length, generator=torch.Generator().manual_seed(length), dtype=torch.float32)
    spread = spread.to(bias.gather.meta["val"].dtype)
    value: torch.Tensor = evaluation.over({bias.gather: spread}, bias.dependent).value(bias.side)
    wanted = bias.without_cuts(spread, evaluation)
    if value.shape != wanted.shape or not torch.equal(value[..., near], wanted[..., near]):
        raise Unknown(f"the bias {bias.gather.name} is changed at keys that are nearer than {extent}")
    if value[..., far].any():
        raise Unknown(f"the bias {bias.gather.name} goes on for keys that are {extent} and more away")
