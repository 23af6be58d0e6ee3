"""Turns in-place ops into their functional forms, so that a node's value never changes after it was computed.

An author's `x.div_(y)`, `index_put_` or `buffer[..., :n] = y` (a copy into a view) becomes a new value, and whatever reads the
written memory later, through whichever view, reads the new value.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Declined, Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import insert_call, is_op, mutates

aten = torch.ops.aten

_ALIASES_WITHOUT_SAYING = ("aten::dropout", "aten::type_as")
"""Composite ops that give their input back in some cases though their schema does not tell."""
_COPIES_SOMETIMES = ("aten::reshape", "aten::flatten", "aten::contiguous", "aten::ravel", "aten::unflatten", "aten::reshape_as")
_CASTS = ("aten::to", "aten::type_as")


class MakeFunctional(Pass):
    """Replaces every in-place op whose effect can be followed; declines the others (writes to inputs and weights, odd views)."""

    name = "core.functional"
    stage = Stage.CLEAN
    after = ("core.asserts",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        for node in [node for node in graph.graph.nodes if mutates(node)]:
            refused = _replace(node)
            if refused is None:
                report.matched += 1
            else:
                report.declined.append(f"{node.name}: {refused.reason}")
        return report


def _replace(node: Node) -> Declined | None:
    target, op = node.args[0], _functional_form(node.target)
    if op is None or not isinstance(target, Node):
        return Declined(f"{node.target} has no functional form that is known")
    path = _path_to_root(target)
    root = path[-1]
    if root.op != "call_function":
        return Declined(f"writes to {root.op} {root.target}")
    family = [alias for alias in _family(root) if alias < node]
    later = [alias for alias in family if alias is not target and any(node < user for user in alias.users)]
    needs_root = [alias for alias in later if not _descends(alias, target)]
    if needs_root:
        for child in path[:-1]:
            if not _invertible(child):
                return Declined(f"{child.name} is read as another view of the same memory, and {child.target} has no inverse")
    shared = [*later, *(path[:-1] if needs_root else [])]
    if any(not _certain(alias) for alias in shared if alias is not root):
        return Declined(f"it cannot be told whether {root.name} shares its memory with a view that is read later")
    value = insert_call(node, op, *node.args, **dict[str, Any](node.kwargs))
    if value.meta["val"].dtype != target.meta["val"].dtype:  # written memory keeps its dtype, a new value is promoted
        value = insert_call(node, aten.to.dtype, value, target.meta["val"].dtype)
    renewed = {target: value}
    node.replace_all_uses_with(renewed[target])
    if needs_root:
        for child, parent in pairwise(path):
            renewed[parent] = _put_back(child, parent, renewed[child], node)
    for alias in family:  # in graph order: a view's parent comes first
        if alias in renewed or not (alias in later or any(_descends(other, alias) for other in later)):
            continue
        source = _viewed(alias)
        if source in renewed:
            renewed[alias] = insert_call(node, alias.target, renewed[source], *alias.args[1:], like=alias, **dict[str, Any](alias.kwargs))
    for alias, value in renewed.items():
        alias.replace_all_uses_with(value, delete_user_cb=lambda user: node < user)
    node.graph.erase_node(node)
    return None


# -- aliases ----------------------------------------------------------------------------------------------------------


def _viewed(node: Node) -> Node | None:
    """The node of whose memory this one may be a view."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target is operator.getitem:
        return node.args[0] if _viewed(node.args[0]) is not None else None
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return None
    if is_op(node, *_CASTS) and not _same_dtype(node):
        return None
    info = node.target._schema.arguments[0].alias_info
    return node.args[0] if info is not None or is_op(node, *_ALIASES_WITHOUT_SAYING) else None


def _path_to_root(node: Node) -> list[Node]:
    path = [node]
    while (parent := _viewed(path[-1])) is not None:
        path.append(parent)
    return path


def _family(root: Node) -> list[Node]:
    """`root` and all views of it, in graph order."""
    members = {root}
    for node in root.graph.nodes:
        if _viewed(node) in members:
            members.add(node)
    return [node for node in root.graph.nodes if node in members]


def _descends(node: Node, ancestor: Node) -> bool:
    return ancestor in _path_to_root(node)


def _certain(node: Node) -> bool:
    """Whether it is known to be a view, rather than perhaps a copy."""
    if is_op(node, *_COPIES_SOMETIMES):
        parent = node.args[0]
        return isinstance(parent, Node) and is_contiguous_or_false(parent.meta["val"])
    if is_op(node, "aten::to"):
        return bound_arguments(node).get("copy") is not True
    if is_op(node, "aten::dropout"):
        return not bound_arguments(node)["train"]
    return True


def _same_dtype(node: Node) -> bool:
    parent = node.args[0]
    return isinstance(parent, Node) and bool(parent.meta["val"].dtype == node.meta["val"].dtype)


# -- inverses of views ------------------------------------------------------------------------------------------------

_SCATTERS = {"aten::slice": aten.slice_scatter.default, "aten::select": aten.select_scatter.default}
_RESHAPES = ("aten::view", "aten::reshape", "aten::flatten", "aten::unsqueeze", "aten::squeeze", "aten::unflatten", "aten::_unsafe_view")
_SAME = ("aten::alias", "aten::detach", "aten::to", "aten::type_as", "aten::contiguous", "aten::dropout")


def _invertible(node: Node) -> bool:
    return is_op(node, *_SCATTERS, *_RESHAPES, *_SAME, "aten::transpose", "aten::permute")


def _put_back(child: Node, parent: Node, value: Node, before: Node) -> Node:
    """`parent` as it is after `child`, a view of it, became `value`."""
    arguments = list(bound_arguments(child).values())[1:]
    for name, scatter in _SCATTERS.items():
        if is_op(child, name):
            return insert_call(before, scatter, parent, value, *arguments, like=child)
    if is_op(child, *_SAME):
        return value
    if is_op(child, "aten::transpose"):
        return insert_call(before, child.target, value, *arguments, like=child)
    if is_op(child, "aten::permute"):
        return insert_call(before, child.target, value, _inverse(arguments[0]), like=child)
    return insert_call(before, aten.view_as.default, value, parent, like=child)


def _inverse(dims: Sequence[int]) -> list[int]:
    positive = [dim % len(dims) for dim in dims]
    return [positive.index(dim) for dim in range(len(dims))]


def _functional_form(op: Any) -> OpOverload | None:
    """aten::add_.Tensor -> aten::add.Tensor: the same arguments, of which the first is not written."""
    schema = op._schema
    name = schema.name.removeprefix("aten::")
    if not name.endswith("_") or [argument.is_write for argument in schema.arguments].count(True) != 1:
        return None
    packet = getattr(aten, name.rstrip("_"), None)
    form = getattr(packet, schema.overload_name or "default", None)
    same = form is not None and [a.name for a in form._schema.arguments] == [a.name for a in schema.arguments]
    return form if same else None
