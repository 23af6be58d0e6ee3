"""The layouts that a linear's weight can have for the CPU: ours, read front to back by C, and oneDNN's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary

LIBRARY = NativeLibrary(Path(__file__).with_name("packed_linear.c"))
BLOCK = 64
"""Outputs that lie together."""


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
    """Blocks of 64 outputs, [N / 64, K / 2, 64, 2]: bfloat16 on processors that multiply pairs of it (`packed_linear.c`)."""

    name, embeds = "native", True

    def __init__(self) -> None:
        self.linear = packed_linear

    def why_not(self, weight: torch.Tensor) -> str | None:
        if weight.dtype != torch.bfloat16:
            return f"{weight.dtype} has no layout of ours"
        if weight.shape[1] % 2:
            return f"{weight.shape[1]} inputs are no pairs"
        declined = LIBRARY.declined(weight.dtype)
        return None if declined is None else declined.reason

    def nbytes(self, weight: torch.Tensor) -> int:
        return -(-weight.shape[0] // BLOCK) * BLOCK * weight.shape[1] * weight.element_size()

    def pack(self, weight: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        rows, inputs = weight.shape
        packed = into.view(weight.dtype).view(-1, inputs // 2, BLOCK, 2)
        padded = F.pad(weight, (0, 0, 0, -rows % BLOCK)) if rows % BLOCK else weight
        return packed.copy_(padded.view(-1, BLOCK, inputs // 2, 2).transpose(1, 2))

    def arguments(self, x: Any, weight: Any, bias: Any, width: int) -> tuple[Any, ...]:
        return (x, weight, bias, width)


def _packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> torch.Tensor:
    """x [..., K] times a packed weight of `width` outputs, plus `bias` [width] -> [..., width], contiguous. Sums in float32."""
    inputs = weight.shape[1] * 2
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
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
