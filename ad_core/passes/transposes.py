"""Removes pairs of transposes that undo each other: a seam turns [B, H, S, D] to [B, S, H, D] right after the model turned it."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import is_op, remove_dead_code, replace


class CancelTransposes(Pass):
    """transpose(transpose(x)) and permute(permute(x)) that together move nothing become x."""

    name = "core.transposes"
    stage = Stage.CLEAN
    after = ("core.clean",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        for node in list(graph.graph.nodes):
            outer = permutation(node)
            inner = permutation(node.args[0]) if outer is not None and isinstance(node.args[0], Node) else None
            if outer is None or inner is None:
                continue
            source = node.args[0].args[0]
            if [inner[dim] for dim in outer] == list(range(len(outer))) and isinstance(source, Node):
                replace(node, source)
                report.matched += 1
        remove_dead_code(graph)
        return report


def permutation(node: Node) -> list[int] | None:
    """Which dim of its argument each dim of the result is, or None if the node does not merely permute dims."""
    if not is_op(node, "aten::permute", "aten::transpose", "aten::swapaxes", "aten::t", "aten::mT", "aten::numpy_T"):
        return None
    rank = node.meta["val"].dim()
    order = list(range(rank))
    arguments = bound_arguments(node)
    if is_op(node, "aten::permute"):
        return [dim % rank for dim in arguments["dims"]]
    if is_op(node, "aten::numpy_T"):
        return order[::-1]
    if rank > 1:
        first, second = (arguments.get(f"dim{end}", arguments.get(f"axis{end}", end - 2)) % rank for end in (0, 1))
        order[first], order[second] = order[second], order[first]
    return order
