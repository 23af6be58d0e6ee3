"""Experts that were kept in a list are stacked once, when their weights are there, and not at every step."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.graph.edit import delete_tensor, is_op, set_tensor, tensor_at, tensors_read


class StackExperts(Pass):
    """Replaces `stack` of weights that `ad_moe::moe` reads by one weight. An expert's own tensor is let go as soon as it is in the stack,
    unless something else reads it or the author's module holds it."""

    name = "moe.stack_experts"
    stage = Stage.LOAD
    safety = "exact"
    requires_ops = ("ad_moe::moe",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        for node in list(graph.graph.nodes):
            if is_op(node, "aten::stack") and any(is_op(user, "ad_moe::moe") for user in node.users):
                reason = self._stacked(graph, node)
                if reason:
                    report.declined.append(f"{node.name}: {reason}")
                else:
                    report.matched += 1
        return report

    def _stacked(self, graph: GraphModule, node: Node) -> str:
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 0 or not isinstance(parts, list | tuple) or not all(isinstance(part, Node) and part.op == "get_attr" for part in parts):
            return "it does not stack weights alone"
        paths = [str(part.target) for part in parts if isinstance(part, Node)]
        first = tensor_at(graph, paths[0])
        if first is None or first.is_meta:
            return "its weights are not there"
        whole = torch.empty(len(paths), *first.shape, dtype=first.dtype, device=first.device)
        target = f"{paths[0]}_stacked"
        set_tensor(graph, target, whole)
        with graph.graph.inserting_before(node):
            read = graph.graph.get_attr(target)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
        graph.graph.erase_node(node)
        for part in dict.fromkeys(part for part in parts if isinstance(part, Node)):
            if not part.users:
                graph.graph.erase_node(part)
        still = tensors_read(graph)
        for index, path in enumerate(paths):
            tensor = tensor_at(graph, path)
            assert tensor is not None
            whole[index] = tensor.detach()
            del tensor
            if path not in still and path not in paths[index + 1 :]:
                delete_tensor(graph, path)
        return ""
