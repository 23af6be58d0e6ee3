"""Removes what export left to check its own assumptions: the assumptions are the graph's inputs, which are ours to keep."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.edit import is_op, remove_dead_code

CHECKS = tuple(
    f"aten::{name}"
    for name in (
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_sym_constrain_range",
        "_functional_sym_constrain_range_for_size",
    )
)


def is_check(node: Node) -> bool:
    """An assertion or the guard module of `ExportedProgram.module()`: nothing reads what it gives."""
    return (node.op == "call_module" and str(node.target).startswith("_guards_fn")) or is_op(node, *CHECKS)


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
