"""The layouts that a linear's weight can have for the CPU: ours, read front to back by C, and oneDNN's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._ops import OpOverload

from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary
from ad_core.native.packed import BLOCK, pack, packed_bytes, why_not_packed

LIBRARY = NativeLibrary(Path(__file__).with_name("packed_linear.c"))


class Layout(Protocol):
    """One way to lay a weight [N, K] out."""

    name: str
    linear: OpOverload
    embeds: bool
    """Whether an embedding can read rows of the packed weight, so that a tied one is there once."""

    def why_not(self, weight: torch.Tensor) -> str | None:
        """Why a weight cannot have this layout; None if it can."""

    def nbytes(self, weight: torch.Tensor) -> int:
        """What the packed weight takes of the memory that is given to `pack`; 0 if it has memory of its own."""

    def pack(self, weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """The packed weight, in the bytes `into`."""

    def arguments(self, x: Any, weight: Any, bias: Any, width: int) -> tuple[Any, ...]:
        """Of a call of `linear`: tokens, packed weight, bias or None, and the number of outputs."""


class OneDnn:
    """oneDNN's packed linear: any CPU, several dtypes. How a weight lies is its secret."""

    name, embeds = "oneDNN", False

    def __init__(self) -> None:
        self.linear: OpOverload = torch.ops.mkldnn._linear_pointwise.default

    def why_not(self, weight: torch.Tensor) -> str | None:
        if not torch._C._has_mkldnn:
            return "this build of torch has no oneDNN"
        try:
            torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=weight.dtype), None)
        except (RuntimeError, AttributeError) as error:
            return f"{weight.dtype} is not packed on this CPU: {str(error).splitlines()[0]}"
        return None

    def nbytes(self, weight: torch.Tensor) -> int:
        return 0

    def pack(self, weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed

    def arguments(self, x: Any, weight: Any, bias: Any, width: int) -> tuple[Any, ...]:
        return (x, weight, bias, "none", [], "")


class Native:
    """The one of `ad_core.native.packed`: bfloat16 on processors that multiply pairs of it."""

    name, embeds = "native", True

    def __init__(self) -> None:
        self.linear = packed_linear

    def why_not(self, weight: torch.Tensor) -> str | None:
        return why_not_packed(weight)

    def nbytes(self, weight: torch.Tensor) -> int:
        return packed_bytes(weight)

    def pack(self, weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        return pack(weight, into)

    def arguments(self, x: Any, weight: Any, bias: Any, width: int) -> tuple[Any, ...]:
        return (x, weight, bias, width)


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> torch.Tensor:
    """x [..., K] times a packed weight of `width` outputs, plus `bias` [width] -> [..., width], contiguous. Sums in float32."""
    inputs = weight.shape[1] * 2
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], width)
    _function()(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        inputs,
        width,
    )
    return out


def _packed_embedding(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [...] of a packed weight -> [..., K]."""
    return weight[ids // BLOCK, :, ids % BLOCK].flatten(-2)


@cache
def _function() -> Callable[..., None]:
    return LIBRARY.function("packed_linear", "pipppiii", torch.bfloat16)


packed_linear = define_op(
    "ad_core::packed_linear(Tensor x, Tensor weight, Tensor? bias, int width) -> Tensor",
    _packed_linear,
    lambda x, weight, bias, width: x.new_empty(*x.shape[:-1], width),
)
packed_embedding = define_op(
    "ad_core::packed_embedding(Tensor weight, Tensor ids) -> Tensor",
    _packed_embedding,
    lambda weight, ids: weight.new_empty(*ids.shape, weight.shape[1] * 2),
)
