"""Writes the real device wherever tracing on meta left its own: arange, ones, casts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.edit import fake_mode_of


class SetDevices(Pass):
    """Maps every `torch.device` among the arguments, positional or by name, and every fake value, to the model's device.

    It runs first: later passes compute fake values and evaluate parts of the graph, and a product of a meta and a CPU tensor does not
    raise, it gives garbage.
    """

    name = "core.devices"
    stage = Stage.CLEAN
    before = ("core.asserts", "core.functional", "core.clean", "core.transposes", "core.positions", "core.duplicates")

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        device, report = context.device, PassReport()

        def constant(value: Any) -> Any:
            return device if isinstance(value, torch.device) else value

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value

        mode = fake_mode_of(node.meta.get("val") for node in graph.graph.nodes)
        with mode, torch.no_grad():
            for node in graph.graph.nodes:
                args, kwargs = map_aggregate(node.args, constant), map_aggregate(node.kwargs, constant)
                report.matched += (args, kwargs) != (node.args, node.kwargs)
                node.args, node.kwargs = args, kwargs
                if "val" in node.meta:
                    node.meta["val"] = map_aggregate(node.meta["val"], moved)
        return report
