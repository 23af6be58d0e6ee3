"""torch.compile over the graph, with shapes dynamic in tokens and sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from ad_core.api.loading import CompileBackend


class InductorBackend(CompileBackend):
    """Compiles at the first calls: minutes for a large model, then faster steps."""

    name = "inductor"

    def compile(self, graph: GraphModule) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(graph, dynamic=True, fullgraph=True)
        return compiled
