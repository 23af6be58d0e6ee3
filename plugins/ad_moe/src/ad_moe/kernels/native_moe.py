"""Routed experts of a few tokens on the CPU, in C (`native_products.c`): each chosen weight is read once. Many tokens go to torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ad_core.api import Declined, Environment, OpCall
from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary
from ad_moe.gating import Gating
from ad_moe.kernels.torch_ref import TorchExperts, TorchRoutedLinear, moe_torch, routed_linear_torch
from ad_moe.linear import LINEAR_ARGUMENTS, linear_fake
from ad_moe.op import ARGUMENTS, moe_fake, post_norm

LIBRARY = NativeLibrary(Path(__file__).with_name("native_products.c"))
FEW = 6
"""Choices an expert, on average, up to which these products beat those of matrix kernels that want many rows."""


def moe_native(
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
    up_transposed: bool = False,
    down_transposed: bool = False,
    weigh_input: bool = False,
    *gating: Any,
) -> torch.Tensor:
    """`ad_moe::moe` on packed tokens [1, T, D]. See there for the arguments."""
    if selected.numel() > FEW * up.shape[0]:
        options = (gate, up_bias, down_bias, norm, norm_eps, up_transposed, down_transposed, weigh_input)
        return moe_torch(tokens, selected, weights, up, down, *options, *gating)

    def up_product(x: torch.Tensor, share: int, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _products(x, share, selected, weight, bias, up_transposed)

    def down_product(x: torch.Tensor) -> torch.Tensor:
        return _products(x, 1, selected, down, down_bias, down_transposed)

    return routed(tokens, selected, weights, up, gate, up_bias, norm, norm_eps, weigh_input, gating, up_product, down_product)


def routed(
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    norm_eps: float,
    weigh_input: bool,
    gating: tuple[Any, ...],
    up_product: Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None], torch.Tensor],
    down_product: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What stands around the products, whatever computes them: `up_product` takes rows, how many choices share one, weight and bias,
    and gives a row for each choice; `down_product` takes and gives one for each."""
    choices = selected.shape[-1]
    x, share, scale = tokens.flatten(0, -2), choices, weights.reshape(-1, 1)  # [T, D], [T * K, 1]
    if weigh_input:
        x, share = x.repeat_interleave(choices, 0) * scale.to(x.dtype), 1
    aside = None if gate is None else up_product(x, share, gate, None)
    result = down_product(_gated(Gating(*gating), up_product(x, share, up, up_bias), aside))  # [T * K, O]
    if norm is not None:
        result = post_norm(result, norm, norm_eps)
    out = tokens.new_empty(*tokens.shape[:-1], result.shape[1])
    factors = None if weigh_input else scale.float().contiguous()
    _sums(tokens.dtype)(
        result.data_ptr(),
        0 if factors is None else factors.data_ptr(),
        out.data_ptr(),
        x.shape[0] * share // choices,
        choices,
        out.shape[-1],
    )
    return out


def _gated(describe: Gating, projected: torch.Tensor, aside: torch.Tensor | None) -> torch.Tensor:
    """What `describe` says, [N, I]; the gate that most models have in one go."""
    if aside is not None or not describe.plain:
        return describe(projected, aside)
    rows, inner = projected.shape[0], projected.shape[1] // 2
    out = projected.new_empty(rows, inner)
    _silu(projected.dtype)(projected.data_ptr(), out.data_ptr(), rows, inner, describe.layout == "interleaved")
    return out


def routed_linear_native(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`ad_moe::routed_linear` on packed tokens [1, T, D] or [1, T, K, D]. See there for the arguments."""
    if selected.numel() > FEW * weight.shape[0]:
        return routed_linear_torch(tokens, selected, weight)
    share = 1 if tokens.dim() > selected.dim() else selected.shape[-1]
    return _products(tokens.flatten(0, -2), share, selected, weight, None, False).view(*selected.shape, -1)


def _products(
    x: torch.Tensor, share: int, selected: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    """Row i / `share` of x [.., In] times the weight of expert `selected`[i] -> [choices, Out], zero where that is no expert.

    `weight` is [E, Out, In] or, if transposed, [E, In, Out].
    """
    experts, first, second = weight.shape
    width, depth = (second, first) if transposed else (first, second)
    chosen = selected.reshape(-1).to(torch.int64).contiguous()
    x, weight, bias = x if x.stride(-1) == 1 else x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(chosen.shape[0], width)
    _function(x.dtype)(
        x.data_ptr(),
        x.stride(0),
        share,
        chosen.data_ptr(),
        chosen.shape[0],
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        experts,
        width,
        depth,
        transposed,
        out.data_ptr(),
    )
    return out


@cache
def _silu(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("silu_and_multiply", "ppiii", dtype)


@cache
def _sums(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("weighted_sums", "pppiii", dtype)


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("routed_products", "piipippiiiip", dtype)


define_op(f"ad_moe::moe_native({ARGUMENTS.format(star='')}) -> Tensor", moe_native, moe_fake)
define_op(f"ad_moe::routed_linear_native({LINEAR_ARGUMENTS}) -> Tensor", routed_linear_native, linear_fake)


class _Native:
    """What both kernels ask of a call."""

    priority = 50
    devices = frozenset({"cpu"})
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        names = ("tokens", "up", "down", "gate", "up_bias", "down_bias", "weight")
        tensors = [call.arguments[name] for name in names if call.arguments.get(name) is not None]
        if len({tensor.dtype for tensor in tensors}) > 1:
            return Declined("tokens and weights are of different dtypes")
        return LIBRARY.declined(call["tokens"].dtype)


class NativeExperts(_Native, TorchExperts):
    name = "moe.native"
    op = "ad_moe::moe_native"


class NativeRoutedLinear(_Native, TorchRoutedLinear):
    name = "moe.linear.native"
    op = "ad_moe::routed_linear_native"
