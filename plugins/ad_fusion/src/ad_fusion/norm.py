"""Root mean square norms (Zhang and Sennrich, 2019) as one op, on the CPU in C (`norm.c`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary

LIBRARY = NativeLibrary(Path(__file__).with_name("norm.c"))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, round_first: bool, dtype: torch.dtype) -> torch.Tensor:
    """x [..., D] / sqrt(mean(x ** 2) + eps) * weight [D] -> [..., D] of `dtype`, contiguous. Computed in float32.

    x and weight are float32 or of `dtype`. With `round_first` the quotient is rounded to `dtype` before it meets the weight.
    """
    outer, outer_stride, inner, inner_stride = 1, 0, 1, 0
    match x.dim(), x.stride(-1):
        case 2, 1:
            inner, inner_stride = x.shape[0], x.stride(0)
        case 3, 1:
            outer, outer_stride, inner, inner_stride = x.shape[0], x.stride(0), x.shape[1], x.stride(1)
        case 4, 1 if x.shape[0] == 1:
            outer, outer_stride, inner, inner_stride = x.shape[1], x.stride(1), x.shape[2], x.stride(2)
        case _:
            x = x.contiguous()
            inner, inner_stride = x.numel() // x.shape[-1], x.shape[-1]
    if weight is not None:
        weight = weight.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    _function(dtype)(
        x.data_ptr(),
        x.dtype == torch.float32,
        outer,
        outer_stride,
        inner,
        inner_stride,
        x.shape[-1],
        0 if weight is None else weight.data_ptr(),
        weight is not None and weight.dtype == torch.float32,
        eps,
        round_first,
        out.data_ptr(),
    )
    return out


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("rms_norm", "piiiiiipifip", dtype)


rms_norm = define_op(
    "ad_fusion::rms_norm(Tensor x, Tensor? weight, float eps, bool round_first, ScalarType dtype) -> Tensor",
    _rms_norm,
    lambda x, weight, eps, round_first, dtype: x.new_empty(x.shape, dtype=dtype),
)
