"""Weights of products in bfloat16 as C wants to read them: front to back, with what an instruction takes lying together.

A weight [..., N, K] becomes [..., N / 64, K / 2, 64, 2], filled up with zeros: pairs of inputs, of 64 outputs each. `ad_native.h`
multiplies with it, on processors that have instructions for pairs of bfloat16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from ad_core.native.library import NativeLibrary
from ad_core.native.memory import in_huge_pages

BLOCK = 64
"""Outputs that lie together."""
ALIGNMENT = 64


class Arena:
    """Memory for many packed weights, one behind the other: few large pages hold them all. Nothing is touched before it is taken."""

    def __init__(self, size: int):
        self._bytes = in_huge_pages(torch.empty(size, dtype=torch.uint8))
        self._used = 0

    @staticmethod
    def rounded(size: int) -> int:
        """What a weight of `size` bytes takes of an arena."""
        return -(-size // ALIGNMENT) * ALIGNMENT

    def take(self, size: int) -> torch.Tensor:
        """The next `size` bytes, [size] uint8."""
        start, self._used = self._used, self._used + self.rounded(size)
        return self._bytes[start : start + size]


def why_not_packed(weight: torch.Tensor) -> str | None:
    """Why a weight [..., N, K] cannot be packed for this machine; None if it can."""
    if weight.dtype != torch.bfloat16:
        return f"{weight.dtype} has no packed layout"
    if weight.shape[-1] % 2:
        return f"{weight.shape[-1]} inputs are no pairs"
    declined = _pairs().declined(weight.dtype)
    return None if declined is None else declined.reason


def packed_bytes(weight: torch.Tensor) -> int:
    """What a weight [..., N, K] takes when it is packed. Only its shape and dtype are looked at."""
    *outer, rows, inputs = weight.shape
    count = -(-int(rows) // BLOCK) * BLOCK * int(inputs)
    for extent in outer:
        count *= int(extent)
    return count * weight.element_size()


def pack(weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """The packed form of a weight [..., N, K] of any strides, in the bytes `into`."""
    *outer, rows, inputs = weight.shape
    packed = into.view(weight.dtype).view(*outer, -1, inputs // 2, BLOCK, 2)
    padded = F.pad(weight, (0, 0, 0, -rows % BLOCK)) if rows % BLOCK else weight
    return packed.copy_(padded.unflatten(-1, (inputs // 2, 2)).unflatten(-3, (-1, BLOCK)).transpose(-3, -2))


@cache
def _pairs() -> NativeLibrary:
    return NativeLibrary(Path(__file__).with_name("pairs.c"))
