"""What a mixer is tested on: named sets of arguments, made at any size from a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Make = Callable[[torch.Generator, int, int, torch.dtype], dict[str, Any]]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference from float64, as a share of the largest expected value (of at least 1)."""


@dataclass(frozen=True)
class Case:
    """One kind of call. `make(generator, B, S, dtype)` gives the canonical op's arguments by name: TOKEN arguments [B, S, ...] and
    PARAM tensors in `dtype`, constants as they are; what is left out takes its default.

    Values must make a difference: a window longer than every sequence tests no window (lengths go up to 24).
    """

    name: str
    make: Make = field(hash=False)
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The plugin's section of the configuration, for `Mixer.resources`."""

    def arguments(self, batch: int, length: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        """The arguments at one size; equal for equal seeds."""
        return self.make(torch.Generator().manual_seed(seed), batch, length, dtype)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with `function` applied to its tensors."""
    return {name: function(value) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same values in float64, integers as they are: what the oracle is given."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, arguments)
