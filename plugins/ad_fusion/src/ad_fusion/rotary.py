"""Rotary embedding (Su et al., 2021) of one half of each row by the other as one op, on the CPU in C (`rotary.c`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary

LIBRARY = NativeLibrary(Path(__file__).with_name("rotary.c"))


def _rotary(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, swapped: bool) -> torch.Tensor:
    """x cosine + (-x2, x1) sine of rows x = (x1, x2) of x [B, P, Q, D] -> [B, P, Q, D], of one dtype, each product rounded to it.

    `cosine` and `sine` have the shape of x, or 1 in its place. The result is contiguous, as [B, Q, P, D] if `swapped`.
    """
    B, P, Q, D = x.shape
    x, cosine, sine = (value if value.stride(3) == 1 else value.contiguous() for value in (x, cosine, sine))
    out = x.new_empty(B, Q, P, D).transpose(1, 2) if swapped else x.new_empty(B, P, Q, D)
    _function(x.dtype)(
        x.data_ptr(),
        *x.stride()[:3],
        cosine.data_ptr(),
        *_strides(cosine),
        sine.data_ptr(),
        *_strides(sine),
        out.data_ptr(),
        B,
        P,
        Q,
        D,
        swapped,
    )
    return out


def _strides(value: torch.Tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(value.shape[:3], value.stride(), strict=False)]


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("rotate", "piiipiiipiiipiiiii", dtype)


def _fake(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, swapped: bool) -> torch.Tensor:
    B, P, Q, D = x.shape
    return x.new_empty(B, Q, P, D).transpose(1, 2) if swapped else x.new_empty(B, P, Q, D)


rotary = define_op("ad_fusion::rotary(Tensor x, Tensor cosine, Tensor sine, bool swapped) -> Tensor", _rotary, _fake)
