"""Removes calls that give back what they got."""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import is_op, mutates, remove_dead_code, replace

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")
_COPIES = ("aten::clone", "aten::contiguous", "aten::lift_fresh_copy")
_ALIASES = ("aten::alias", "aten::detach", "aten::lift_fresh", "aten::resolve_conj", "aten::resolve_neg")
_SHAPES = (
    "aten::view",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::flatten",
    "aten::expand",
    "aten::expand_as",
    "aten::slice",
    "aten::squeeze",
)


class RemoveNoOps(Pass):
    """Drops casts to the same dtype, copies, identity views, dropout at inference, products with one; then dead code.

    Fake values decide. Copies stay where something in the graph is still written to in place.
    """

    name = "core.clean"
    stage = Stage.CLEAN
    after = ("core.asserts", "core.functional")

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        written = any(mutates(node) for node in graph.graph.nodes)
        report = PassReport(notes=["copies stay: the graph writes in place"] if written else [])
        for node in list(graph.graph.nodes):
            source = same_value(node, copies=not written)
            if source is not None:
                replace(node, source)
                report.matched += 1
        removed = remove_dead_code(graph)
        if removed:
            report.notes.append(f"{removed} dead nodes")
        return report


def same_value(node: Node, *, copies: bool = True) -> Node | None:
    """The argument that the node gives back unchanged, or None. `copies` says whether a copy counts as unchanged."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if is_op(node, "aten::copy"):  # what is copied, not what it replaces
        source = node.args[1]
    if not isinstance(source, Node):
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or not _alike(before, after):
        return None
    if is_op(node, *_SHAPES, *_ALIASES, "aten::copy") or (is_op(node, "aten::dropout") and _inert_dropout(node)) or _times_one(node, after):
        return source
    if is_op(node, *_CASTS):
        copied = bound_arguments(node).get("copy") is True
        return source if _keeps_layout(node, before) and (copies or not copied) else None
    if is_op(node, *_COPIES):
        return source if copies and _keeps_layout(node, before) else None
    return None


def _alike(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Same dtype and shape; a device "meta" is any device, for that is where weights are before they are loaded."""
    devices = {before.device, after.device}
    return (
        before.dtype == after.dtype
        and before.layout == after.layout
        and len(before.shape) == len(after.shape)
        and all(_same_size(one, other) for one, other in zip(before.shape, after.shape, strict=True))
        and (len(devices) == 1 or torch.device("meta") in devices)
    )


def _same_size(one: Any, other: Any) -> bool:
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (one, other)]
    return bool(expressions[0] == expressions[1])


def _keeps_layout(node: Node, before: torch.Tensor) -> bool:
    """Whether the strides stay: a later view may count on them."""
    wanted = bound_arguments(node).get("memory_format")
    return wanted in (None, torch.preserve_format) or (wanted == torch.contiguous_format and is_contiguous_or_false(before))


def _inert_dropout(node: Node) -> bool:
    arguments = bound_arguments(node)
    return not arguments["train"] or arguments["p"] == 0


def _times_one(node: Node, value: torch.Tensor) -> bool:
    """x * 1, x / 1, and i + 0 for whole numbers (for floats it turns -0 into 0)."""
    if is_op(node, "aten::mul", "aten::div"):
        return _is_number(node.args[1], 1) and bound_arguments(node).get("rounding_mode") is None
    return is_op(node, "aten::add", "aten::sub") and not value.is_floating_point() and _is_number(node.args[1], 0)


def _is_number(argument: Any, value: int) -> bool:
    return isinstance(argument, int | float) and not isinstance(argument, bool) and argument == value
