"""Experts' weights for the CPU are laid out once as its instructions want them, and not converted at every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import delete_tensor, is_op, replace, set_tensor, tensor_at, tensors_read
from ad_core.native.packed import Arena, pack, packed_bytes, why_not_packed
from ad_moe.kernels.packed_moe import moe_packed

_WEIGHTS = {"up": "up_transposed", "down": "down_transposed", "gate": "up_transposed"}
"""The weights of a call, each with the argument that says whether its last dimensions are exchanged."""


class PackExperts(Pass):
    """Replaces the native kernel's weights by packed ones, and the kernel by one that reads them. What was not packed is let go."""

    name = "moe.pack_experts"
    stage = Stage.COMPILE
    safety = "reordered"
    requires_ops = ("ad_moe::moe_native",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        readers = {path: len(nodes) for path, nodes in tensors_read(graph).items()}
        packable = []
        for node in graph.graph.nodes:
            if not is_op(node, "ad_moe::moe_native"):
                continue
            reason = _why_not(graph, node, readers)
            if reason is None:
                packable.append(node)
            else:
                report.declined.append(f"{node.name}: {reason}")
        arena = Arena(sum(Arena.rounded(packed_bytes(weight)) for node in packable for weight in _weights(graph, node).values()))
        for node in packable:
            _pack(graph, node, arena)
            report.matched += 1
        return report


def _weights(graph: GraphModule, node: Node) -> dict[str, torch.Tensor]:
    """The weights of a call as [E, Out, In], by argument."""
    arguments, found = bound_arguments(node), {}
    for name, flag in _WEIGHTS.items():
        if arguments[name] is not None:
            tensor = tensor_at(graph, str(arguments[name].target))
            assert tensor is not None
            found[name] = tensor.detach().transpose(1, 2) if arguments[flag] else tensor.detach()
    return found


def _why_not(graph: GraphModule, node: Node, readers: Mapping[str, int]) -> str | None:
    """Why a call's weights are left as they are; None if all of them can be packed. `readers` counts the reads of each path."""
    arguments = bound_arguments(node)
    for name in _WEIGHTS:
        source = arguments[name]
        if source is None:
            continue
        if not isinstance(source, Node) or source.op != "get_attr":
            return f"{name} is computed"
        if len(source.users) > 1 or readers[str(source.target)] > 1:
            return f"{name} is read by something else too"
    return next((reason for weight in _weights(graph, node).values() if (reason := why_not_packed(weight))), None)


def _pack(graph: GraphModule, node: Node, arena: Arena) -> None:
    """Packs one call's weights, one after the other: a whole one more is there for no longer than that takes."""
    arguments = bound_arguments(node)
    packed: dict[str, Node] = {}
    widths: dict[str, int] = {}
    for name in _WEIGHTS:
        source = arguments[name]
        if source is None:
            continue
        weight, path = _weights(graph, node)[name], f"{source.target}_packed"
        widths[name] = int(weight.shape[1])
        value = pack(weight, arena.take(packed_bytes(weight)))
        set_tensor(graph, path, value)
        del weight
        with graph.graph.inserting_before(node):
            packed[name] = graph.graph.get_attr(path)
        packed[name].meta = {**source.meta, "val": source.meta["val"].new_empty(value.shape)}
        node.replace_input_with(source, packed[name])
        graph.graph.erase_node(source)
        delete_tensor(graph, str(source.target))
    gone = ("up_transposed", "down_transposed")
    rest = [packed.get(name, value) for name, value in arguments.items() if name not in gone]
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(moe_packed, (widths["up"], widths["down"], *rest))
    call.meta = dict(node.meta)
    replace(node, call)
