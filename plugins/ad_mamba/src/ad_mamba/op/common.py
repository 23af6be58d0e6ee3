"""What both ops do before and after their recurrence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in, and what states are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def time_steps(
    dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, low: float = -math.inf, high: float | None = None
) -> torch.Tensor:
    """softplus(dt + bias), cut to `low` .. `high`, in the wide dtype. dt [..., H], bias [H]."""
    dtype = wide(dt.dtype)
    steps = dt.to(dtype)
    if bias is not None:
        steps = steps + bias
    if softplus:
        steps = F.softplus(steps)
    if low > (0 if softplus else -math.inf) or high is not None:
        steps = steps.clamp(low, high)
    return steps


def blocks(length: int, size: int) -> list[slice]:
    """`length` tokens in blocks of `size`: what a block needs in between is all that is in memory at once."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
