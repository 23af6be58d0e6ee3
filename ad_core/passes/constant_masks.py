"""Masks that choose all rows of a batch or none, whatever is in it: what is read or written through them is the whole, or nothing.

A model that treats the rows of each kind (one language, say) apart, and takes a default kind for all of them, exports as an index by
a mask: with a size that depends on data, though no data decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import insert_call, is_op, mutates, refresh_value, remove_dead_code, replace

aten = torch.ops.aten

_FILLED = {"aten::ones": 1, "aten::ones_like": 1, "aten::new_ones": 1, "aten::zeros": 0, "aten::zeros_like": 0, "aten::new_zeros": 0}
_FILLED_WITH = {"aten::full": "fill_value", "aten::full_like": "fill_value", "aten::new_full": "fill_value", "aten::scalar_tensor": "s"}
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape flatten unsqueeze squeeze expand expand_as transpose permute slice select clone contiguous alias detach"
    ).split()
)
_CASTS = ("aten::to", "aten::_to_copy")


class ConstantMasks(Pass):
    """Replaces reads and writes of rows by a mask [B] that is true everywhere, or false everywhere, by the whole or by nothing."""

    name = "core.constant_masks"
    stage = Stage.CLEAN
    after = ("core.asserts", "core.functional")
    before = ("core.clean",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        if not any(_mask(node) for node in graph.graph.nodes):
            return PassReport()
        if any(mutates(node) for node in graph.graph.nodes):
            return PassReport(notes=["masks stay: the graph writes in place"])
        report, uniform, stale = PassReport(), uniform_values(graph), set[Node]()
        for node in list(graph.graph.nodes):
            if node in stale and node.op == "call_function":
                before = str(_shape(node))
                refresh_value(node)
                if str(_shape(node)) != before:
                    stale |= set(node.users)
            mask = _mask(node)
            if mask is None or mask not in uniform:
                continue
            instead = _instead(node, bool(uniform[mask]))
            if instead is not None:
                stale |= set(node.users)
                replace(node, instead)
                report.matched += 1
        if report.matched:
            remove_dead_code(graph)
        return report


def uniform_values(graph: GraphModule) -> dict[Node, torch.Tensor]:
    """The tensors of the graph that hold one value everywhere, at any size and for any input: that value, [1] (or []) in their dtype.

    Nothing in the graph may write in place.
    """
    found: dict[Node, torch.Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and isinstance(node.target, OpOverload):
            value = _uniform(node, found)
            if value is not None:
                found[node] = value.to(node.meta["val"].dtype).reshape((1,) * min(1, node.meta["val"].dim()))
    return found


def _uniform(node: Node, known: Mapping[Node, torch.Tensor]) -> torch.Tensor | None:
    for name, filling in _FILLED.items():
        if is_op(node, name):
            return torch.tensor(filling)
    for name, argument in _FILLED_WITH.items():
        if is_op(node, name):
            filling = bound_arguments(node)[argument]
            return None if isinstance(filling, Node) else torch.tensor(filling)
    if is_op(node, *_VIEWS, *_CASTS):
        return known.get(node.args[0])  # type: ignore[arg-type]
    tags = node.target.tags  # type: ignore[union-attr]
    pointwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    if pointwise and node.all_input_nodes and all(parent in known for parent in node.all_input_nodes):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result
    return None


def _mask(node: Node) -> Node | None:
    """The mask [B] by which `node` reads or writes rows, and nothing else."""
    if not is_op(node, "aten::index", "aten::index_put"):
        return None
    indices: Any = node.args[1]
    mask = indices[0] if len(indices) == 1 else None
    one_dim = isinstance(mask, Node) and mask.meta["val"].dtype == torch.bool and mask.meta["val"].dim() == 1
    return mask if one_dim else None


def _instead(node: Node, everywhere: bool) -> Node | None:
    """What `node` gives, if its mask is true (or false) everywhere. None rows that are read stay: nothing may come of them."""
    whole: Node = node.args[0]  # type: ignore[assignment]
    if is_op(node, "aten::index"):
        return whole if everywhere else None
    if not everywhere:
        return whole
    arguments = bound_arguments(node)
    written = insert_call(node, aten.expand_as.default, arguments["values"], whole)
    return insert_call(node, aten.add.Tensor, whole, written) if arguments["accumulate"] else written


def _shape(node: Node) -> Any:
    value = node.meta["val"]
    return value.shape if isinstance(value, torch.Tensor) else value
