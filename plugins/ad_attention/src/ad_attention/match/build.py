"""New nodes around the canonical op: operands brought to [B, S, H, D], its result brought to where it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_attention.match.axes import BATCH_AXIS, FEATURE, HEADS, SEQUENCE, Atom, Layout
from ad_attention.match.evaluate import writers
from ad_core.graph.edit import free_name, insert_call

aten = torch.ops.aten


def constant(graph: GraphModule, like: Node, name: str, value: torch.Tensor) -> Node:
    """A get_attr of a new non-persistent buffer, which no checkpoint knows, just before `like` and on its device."""
    unique = free_name(graph, f"_ad_{name}")
    fake = like.meta["val"]
    graph.register_buffer(unique, value if fake.device.type == "meta" else value.to(fake.device), persistent=False)
    with graph.graph.inserting_before(like):
        node = graph.graph.get_attr(unique)
    with fake.fake_mode:
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=fake.device)
    return node


def _view(end: Node, target: Any, *args: Any) -> Node:
    """A view made before `end`: the one that another attention made of the same tensor, if there is one, for memory is shared by node."""
    source: Node = args[0]
    for user in source.users:
        if user.target is target and user.args == args and not user.kwargs and not writers(source):
            if not user < end:  # proposals are written in any order
                end.prepend(user)
            return user
    return insert_call(end, target, *args)


def tokens(end: Node, layout: Layout, dtype: torch.dtype) -> Node:
    """[B, S, H, D] of the layout in `dtype`, made before `end`."""
    node = layout.node
    order = layout.permutation()
    assert order is not None
    if len(order) < len(layout.groups):
        empty = [dim for dim in range(len(layout.groups)) if dim not in order]
        node = _view(end, aten.squeeze.dims, node, empty)
        order = [dim - sum(other < dim for other in empty) for dim in order]
    if order != list(range(len(order))):
        node = _view(end, aten.permute.default, node, order)
    heads = len(order) - 3
    if heads == 0:
        node = _view(end, aten.unsqueeze.default, node, 2)
    elif heads > 1:
        node = _view(end, aten.flatten.using_ints, node, 2, 1 + heads)
    if node.meta["val"].dtype != dtype:
        node = _view(end, aten.to.dtype, node, dtype)
    return node


def columns(end: Node, column: Node) -> Node:
    """[B, S, H] of a column [B, H, S, 1], made before `end`."""
    return _view(end, aten.permute.default, _view(end, aten.squeeze.dims, column, [3]), [0, 2, 1])


def from_tokens(result: Node, layout: Layout) -> Node:
    """The op's result, [B, S, H, D], in the dimensions and the dtype of `layout`, before whose node it is made."""
    node, end = result, layout.node
    heads = layout.heads
    if not heads:
        node = _view(end, aten.squeeze.dims, node, [2])
    elif len(heads) > 1:
        node = _view(end, aten.unflatten.int, node, 2, [atom.size for atom in heads])
    now: list[Atom | str] = [BATCH_AXIS, SEQUENCE, *heads, FEATURE]
    wanted = [atom if atom.kind == HEADS else atom.kind for group in layout.groups for atom in group]
    order = [now.index(atom) for atom in wanted]
    if order != list(range(len(order))):
        node = _view(end, aten.permute.default, node, order)
    for dim, group in enumerate(layout.groups):
        if len(group) > 1:
            node = _view(end, aten.flatten.using_ints, node, dim, dim + len(group) - 1)
        elif not group:
            node = _view(end, aten.unsqueeze.default, node, dim)
    if node.meta["val"].dtype != end.meta["val"].dtype:
        node = _view(end, aten.to.dtype, node, end.meta["val"].dtype)
    return node
