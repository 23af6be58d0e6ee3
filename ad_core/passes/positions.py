"""Positions that a model counts itself become the input `position_ids`: in a packed batch only the engine knows them.

Found by running the part of the graph that reads sizes but no data, at two lengths, so that any spelling counts: an arange, a
cumulative sum of ones less one, either plus an offset. What counts data (ids that are not padding) is not found here; it
stays, and `find_mixing` reports it.

Shapes: `position_ids` is [B, S]. A value [B, S] is replaced as it is. So is a value [1, S] (one row for the whole batch) if what is
computed from it still has its shape with a batch of rows; else, and for a value [S], the first row is taken: all rows are
equal, as they were before, or there is only one. Masks [S, S] built from positions keep theirs: matchers read them,
and a mixer that is found drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.axes import Sizes
from ad_core.graph.edit import find_input, insert_call, live_nodes, mutates, new_input, refresh_value, remove_dead_code

aten = torch.ops.aten


class OwnPositions(Pass):
    """Replaces values equal to arange(length) + offset, however they were computed, by `position_ids` + offset."""

    name = "core.positions"
    stage = Stage.CLEAN
    after = ("core.asserts", "core.functional", "core.clean")

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        sizes = Sizes(graph)
        computed = _evaluate(graph, sizes)
        masks = _Masks(graph, sizes)
        for node, offset in computed.items():
            users = [user for user in node.users if user not in computed and not masks.only(user)]
            if users:
                _substitute(graph, node, users, offset)
                report.matched += 1
                report.notes.append(f"{node.name} was arange + {offset}" if offset else f"{node.name} was arange")
        if report.matched:
            remove_dead_code(graph)
        return report


def _evaluate(graph: GraphModule, sizes: Sizes) -> dict[Node, int]:
    """Nodes made of sizes and constants alone that equal arange + offset, with that offset."""
    both = (sizes, sizes.other_length())
    found: dict[Node, int] = {}
    for node, values in size_values(graph, both).items():
        offset = _offset(values, both) if _positions_shape(node.meta["val"], sizes) else None
        if offset is not None:
            found[node] = offset
    return found


def size_values(graph: GraphModule, both: tuple[Sizes, Sizes]) -> dict[Node, list[Any]]:
    """The values, at two lengths, of the nodes that are made of sizes and constants alone."""
    live = live_nodes(graph.graph)
    values: dict[Node, list[Any]] = {}
    for node in graph.graph.nodes:
        if node not in live or node.op != "call_function" or node.meta.get("val") is None or mutates(node):
            continue
        value = node.meta["val"]
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and not value.node.expr.free_symbols - both[0].symbols:
            values[node] = [each.number(value) for each in both]
            continue
        if not all(parent in values for parent in node.all_input_nodes) or not _deterministic(node):
            continue
        try:
            values[node] = [_call(node, {parent: values[parent][index] for parent in node.all_input_nodes}) for index in (0, 1)]
        except Exception:  # an op may refuse for any reason; then its value is not known, and what follows from it neither
            values.pop(node, None)
    return values


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    to_cpu = lambda value: torch.device("cpu") if isinstance(value, torch.device) else value  # noqa: E731
    args, kwargs = torch.fx.node.map_aggregate((args, kwargs), to_cpu)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _deterministic(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags


def _positions_shape(value: Any, sizes: Sizes) -> bool:
    """Whether the last of one or two dims is that of the tokens; all rows in one dim are not, though they look so while the batch is 1."""
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool or not 1 <= value.dim() <= 2:
        return False
    return sizes.carries_length(value.shape[-1]) and not sizes.carries_batch(value.shape[-1])


def _offset(values: list[torch.Tensor], sizes: tuple[Sizes, Sizes]) -> int | None:
    offsets = set()
    for value, size in zip(values, sizes, strict=True):
        if value.shape[-1] != size.length or value.numel() == 0:
            return None
        offsets |= set((value - torch.arange(size.length)).flatten().tolist())
    return int(offsets.pop()) if len(offsets) == 1 else None


class _Masks:
    """Which values made of sizes and positions end in values [S, S] and nowhere else."""

    def __init__(self, graph: GraphModule, sizes: Sizes):
        self._sizes = sizes
        self._known: dict[Node, bool] = {}
        self._plain: set[Node] = set()
        for node in graph.graph.nodes:
            given = node.op == "placeholder" and node.target == "position_ids"
            made = node.op == "call_function" and all(parent in self._plain or not _is_tensor(parent) for parent in node.all_input_nodes)
            if given or made:
                self._plain.add(node)

    def only(self, node: Node) -> bool:
        if node not in self._known:
            square = len(self._sizes.length_dims(node.meta.get("val"))) > 1
            self._known[node] = square or (node in self._plain and bool(node.users) and all(self.only(user) for user in node.users))
        return self._known[node]


def _is_tensor(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _substitute(graph: GraphModule, node: Node, users: list[Node], offset: int) -> None:
    """Makes `users` read the input instead of `node`, plus the offset, in the shape that they can take."""
    positions = _position_input(graph)
    value = node.meta["val"]
    spelled = positions
    if offset:
        spelled = insert_call(node, aten.add.Tensor, positions, offset)
    if value.dim() == 2 and not (isinstance(value.shape[0], int) and value.shape[0] == 1):
        rows = spelled
    elif value.dim() == 2 and _take_rows(graph, node, users, spelled):
        return
    else:
        rows = (
            insert_call(node, aten.slice.Tensor, spelled, 0, 0, 1)
            if value.dim() == 2
            else insert_call(node, aten.select.int, spelled, 0, 0)
        )
    if value.dtype != rows.meta["val"].dtype:
        rows = insert_call(node, aten.to.dtype, rows, value.dtype)
    for user in users:
        user.replace_input_with(node, rows)


def _take_rows(graph: GraphModule, node: Node, users: list[Node], rows: Node) -> bool:
    """Gives `users` a value [B, S] in the place of [1, S] if everything that follows keeps its shape, up to where the batch comes in."""
    if node.meta["val"].dtype != rows.meta["val"].dtype:
        return False
    for user in users:
        user.replace_input_with(node, rows)
    before: dict[Node, Any] = {}
    stale = set(users)
    try:
        for each in graph.graph.nodes:
            if each not in stale or each.op == "output":
                continue
            before[each] = each.meta["val"]
            refresh_value(each)
            if _shape(each.meta["val"]) != _shape(before[each]):
                if not _only_batched(before[each], each.meta["val"]):
                    raise ValueError(each.name)
                stale |= set(each.users)
    except Exception:  # a fake may raise anything: then the batch of rows does not fit, and the one row stays
        for each, value in before.items():
            each.meta["val"] = value
        for user in users:
            user.replace_input_with(rows, node)
        return False
    return True


def _shape(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shape(item) for item in value]
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else str(value)


def _only_batched(before: Any, after: Any) -> bool:
    """Whether the first dim, which was 1, is all that changed."""
    if isinstance(before, list | tuple):
        return all(_only_batched(one, other) for one, other in zip(before, after, strict=True))
    return (
        isinstance(before, torch.Tensor)
        and before.dim() == after.dim()
        and isinstance(before.shape[0], int)
        and before.shape[0] == 1
        and _shape(before)[1:] == _shape(after)[1:]
    )


def _position_input(graph: GraphModule) -> Node:
    """The placeholder `position_ids`, made to look like `input_ids` if there is none."""
    found = find_input(graph, "position_ids")
    if found is not None:
        return found
    like = find_input(graph, "input_ids") or find_input(graph, "inputs_embeds")
    assert like is not None  # `Sizes` has seen one
    value = like.meta["val"]
    with value.fake_mode:
        ids = torch.empty(value.shape[:2], dtype=torch.int64, device=value.device)
    return new_input(graph, "position_ids", ids)
