"""A graph of half precision, computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Interpreter
from torch.fx.node import map_aggregate

HALF = (torch.bfloat16, torch.float16)


class InFloat32(Interpreter):
    """Runs a graph with the same weights in float32, whatever the graph says."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_aggregate((args, kwargs), self.constant)
        return super().call_function(target, args, kwargs)

    def constant(self, value: Any) -> Any:
        """What stands in the place of an argument."""
        return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value
