"""Which `Gating` a module's own gate function is: by trying it on numbers, so that no class has to be known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from ad_moe.gating import ACTIVATIONS, Gating, Layout

_COLUMNS = 96
_REACH = 24.0
"""Inputs go from minus to plus this, further than any limit that models have, and than where an activation saturates."""


def recognised(function: Callable[[torch.Tensor], torch.Tensor], holder: nn.Module, layout: Layout) -> Gating | None:
    """The gating that `function`, a method or activation of `holder`, computes: [N, 2I] -> [N, I], or [N, I] -> [N, I] for layout "none".

    Limits and slopes are looked for among the numbers that `holder` and its parts hold. None if nothing agrees.
    """
    probe = _probe(1 if layout == "none" else 2)
    try:
        with torch.no_grad():
            wanted = function(probe.clone())
    except Exception:  # any code of the author's; what does not run on plain numbers is not recognised
        return None
    if not isinstance(wanted, torch.Tensor) or wanted.shape != (probe.shape[0], _COLUMNS):
        return None
    for gating in _candidates(layout, numbers_of(holder)):
        if torch.allclose(gating(probe), wanted.to(probe.dtype), rtol=1e-5, atol=1e-5):
            return gating
    return None


def _probe(parts: int) -> torch.Tensor:
    """[N, parts * columns] in float32, small and large values, gate and up each with its own."""
    rows = torch.randn(4, parts * _COLUMNS, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([[0.5], [2.0], [_REACH / 3], [_REACH]])
    return rows * scales


def _candidates(layout: Layout, numbers: tuple[float, ...]) -> Iterator[Gating]:
    """Likely ones first."""
    for activation in ACTIVATIONS:
        yield Gating(activation, layout)
    if layout == "none":
        return
    limits: tuple[float | None, ...] = (None, *(number for number in numbers if number > 0))
    for limit, after, alpha, offset, activation in product(limits, (False, True), (1.0, *numbers), (0.0, 1.0), ACTIVATIONS):
        if (activation == "silu" or alpha == 1.0) and (limit is not None or not after):
            yield Gating(activation, layout, alpha, limit, after, offset)
    for gate_cap, up_cap in product(limits, limits):
        yield Gating("silu", layout, gate_cap=gate_cap, up_cap=up_cap)


def numbers_of(holder: nn.Module) -> tuple[float, ...]:
    """Every distinct finite float that the module or a part of it holds, and the slope of the quick form of gelu."""
    values: list[Any] = [value for part in holder.modules() for value in vars(part).values()]
    found = [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return tuple(dict.fromkeys([*(number for number in found if 0 < abs(number) < 1e3), 1.702]))
