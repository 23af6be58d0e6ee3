"""Memory that shows when it is read without having been written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fills with NaN, or the largest integer, or True. In place; returns the tensor."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While open, what PyTorch gives out as uninitialised memory is filled with NaN and largest integers."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit: NaN equals the same NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    """Indices of the first dimension where any bit differs."""
    differs = (_bytes(before).view(before.shape[0], -1) != _bytes(after).view(after.shape[0], -1)).any(1)
    return set(differs.nonzero().flatten().tolist())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
