"""Computes once what the graph computes twice: every layer unsqueezes the same rotary table."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.edit import mutates, replace


class MergeDuplicates(Pass):
    """Merges ATen calls (and reads of one weight) with equal arguments. Canonical ops and whatever else a package defines stay:
    the capture verifier counts them."""

    name = "core.duplicates"
    stage = Stage.CLEAN
    after = ("core.transposes", "core.positions")

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        if any(mutates(node) for node in graph.graph.nodes):
            report.declined.append("the graph writes in place, so equal calls may differ")
            return report
        seen: dict[Hashable, Node] = {}
        for node in list(graph.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)
                report.matched += 1
        return report


def _key(node: Node) -> Hashable | None:
    """Equal keys compute equal values. None: the node is not to be merged."""
    if node.op == "get_attr":
        return (node.op, node.target)
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload) and (node.target.namespace != "aten" or torch.Tag.nondeterministic_seeded in node.target.tags):
        return None
    return (node.target, _hashable(node.args), _hashable(node.kwargs))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return (type(value).__name__, tuple(_hashable(item) for item in value))
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _hashable((value.start, value.stop, value.step)))
    # 1, 1.0 and True are equal and mean different dtypes; 0.0 and -0.0 are equal too.
    return value if isinstance(value, Node) else (type(value).__name__, repr(value))
