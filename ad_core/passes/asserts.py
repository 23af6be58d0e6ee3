"""Removes what export left to check its own assumptions: the assumptions are the graph's inputs, which are ours to keep."""

from __future__ import annotations

from torch.fx import GraphModule

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.edit import remove_dead_code
from ad_core.graph.verify import is_check


class RemoveAsserts(Pass):
    """Drops runtime assertions and guards, and what was computed for them alone."""

    name = "core.asserts"
    stage = Stage.CLEAN

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        checks = [node for node in graph.graph.nodes if is_check(node)]
        for node in checks:
            graph.graph.erase_node(node)
        removed = remove_dead_code(graph)
        return PassReport(matched=len(checks), notes=[f"{removed} nodes were computed for nobody"] if removed else [])
