"""Regions that export keeps as sub-graphs, because a context was open in the forward there."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ad_core.api.errors import CaptureError
from ad_core.graph.calls import module_path


def inline_regions(graph: GraphModule) -> None:
    """Puts the nodes of every region in the place of its call: a switched-off autocast changes nothing in a capture without one.

    Changes `graph`. Raises `CaptureError` for a region that computes in another precision, and for any other kind of region.
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        arguments = _region_arguments(node)
        if arguments is None:
            continue
        _inline(graph, node, arguments)
    graph.graph.eliminate_dead_code()


def _region_arguments(node: Node) -> tuple[Node, tuple[object, ...]] | None:
    """(the node of the sub-graph, its arguments)."""
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        return node.args[1], node.args[2:]  # type: ignore[return-value]
    if name != "wrap_with_autocast":
        raise CaptureError(
            f"the forward calls {name}, which capture cannot follow",
            where=module_path(node),
            hint="control flow that depends on data must be written without it",
        )
    device, dtype, enabled, _, region, *arguments = node.args
    if enabled:
        raise CaptureError(
            f"the forward computes a part in autocast to {dtype or 'another precision'} on {device}",
            where=module_path(node),
            hint="cast the tensors themselves, or leave precision to the model's dtype",
        )
    return region, tuple(arguments)  # type: ignore[return-value]


def _inline(graph: GraphModule, call: Node, found: tuple[Node, tuple[object, ...]]) -> None:
    region_node, arguments = found
    region = graph.get_submodule(str(region_node.target))
    assert isinstance(region, GraphModule)
    inline_regions(region)
    values: dict[Node, object] = {}
    given = iter(arguments)
    with graph.graph.inserting_before(call):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(given)
            elif inner.op != "output":
                values[inner] = graph.graph.node_copy(inner, lambda parent: values[parent])  # type: ignore[arg-type,return-value]
    outputs = next(inner for inner in region.graph.nodes if inner.op == "output").args[0]
    if isinstance(outputs, Node):
        call.replace_all_uses_with(values[outputs])  # type: ignore[arg-type]
    else:
        for user in list(call.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(values[outputs[user.args[1]]])  # type: ignore[arg-type,index]
            graph.graph.erase_node(user)
    graph.graph.erase_node(call)
