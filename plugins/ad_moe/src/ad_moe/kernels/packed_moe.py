"""Routed experts with packed weights on the CPU, in C (`packed_products.c`): any number of tokens. `ad_moe.pack_pass` puts it into
graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary
from ad_moe.kernels.native_moe import routed
from ad_moe.op import ARGUMENTS

LIBRARY = NativeLibrary(Path(__file__).with_name("packed_products.c"))


def _moe(
    up_width: int,
    down_width: int,
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    weigh_input: bool = False,
    *gating: Any,
) -> torch.Tensor:
    """`ad_moe::moe` on packed tokens [1, T, D], with packed weights of `up_width` (2I or I) and `down_width` (O) outputs."""

    def up_product(x: torch.Tensor, share: int, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _products(x, share, selected, weight, bias, up_width)

    def down_product(x: torch.Tensor) -> torch.Tensor:
        return _products(x, 1, selected, down, down_bias, down_width)

    return routed(tokens, selected, weights, up, gate, up_bias, norm, norm_eps, weigh_input, gating, up_product, down_product)


def _products(
    x: torch.Tensor, share: int, selected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, width: int
) -> torch.Tensor:
    """Row i / `share` of x [.., In] times the packed weight of expert `selected`[i] -> [choices, width], zero where that is no expert."""
    chosen = selected.reshape(-1).to(torch.int64).contiguous()
    x, bias = x if x.stride(-1) == 1 else x.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(chosen.shape[0], width)
    _function()(
        x.data_ptr(),
        x.stride(0),
        share,
        chosen.data_ptr(),
        chosen.shape[0],
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        weight.shape[0],
        width,
        weight.shape[2] * 2,
        out.data_ptr(),
    )
    return out


@cache
def _function() -> Callable[..., None]:
    return LIBRARY.function("packed_products", "piipippiiip", torch.bfloat16)


def _fake(up_width: int, down_width: int, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    return tokens.new_empty(*tokens.shape[:-1], down_width)


_REST = ARGUMENTS.format(star="").replace("bool up_transposed=False, bool down_transposed=False, ", "")
moe_packed = define_op(f"ad_moe::moe_packed(int up_width, int down_width, {_REST}) -> Tensor", _moe, _fake)
