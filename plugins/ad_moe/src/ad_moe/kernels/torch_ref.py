"""The kernels in plain torch: choices sorted by expert, one product for each expert that is chosen. No other expert's weights are read.

Measured on a CPU with bfloat16 instructions, 24 experts of 2048 x 1536: `linear` for each expert is as fast as `grouped_mm` (which is such
a loop there) and as `mm` into a part of the result, and ten times as fast as gathering the experts' weights for one `bmm`.
"""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import Kernel
from ad_core.graph.ops import define_op
from ad_moe.gating import Gating
from ad_moe.kernels.groups import Groups
from ad_moe.linear import LINEAR_ARGUMENTS, linear_fake
from ad_moe.op import ARGUMENTS, moe_fake, post_norm


class TorchExperts(Kernel):
    """Any device. The chosen experts are read back to the host, which a graph of a GPU cannot hold."""

    name = "moe.torch"
    target = "ad_moe::moe"
    op = "ad_moe::moe_torch"
    priority = 0
    graph = "never"


class TorchRoutedLinear(Kernel):
    """Any device, as above."""

    name = "moe.linear.torch"
    target = "ad_moe::routed_linear"
    op = "ad_moe::routed_linear_torch"
    priority = 0
    graph = "never"


def moe_torch(
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
    describe = Gating(*gating)
    groups = Groups.of(selected, up.shape[0])
    rows = groups.rows(selected.shape[-1])
    x, scale = tokens.flatten(0, -2), groups.pick(weights.flatten())  # [T, D], [N]
    inner = x.expand(scale.shape[0], -1) if rows is None else x[rows]
    if weigh_input:
        inner = inner * scale[:, None].to(inner.dtype)
    inner = inner.to(up.dtype)
    if up_transposed:
        up, gate = up.transpose(1, 2), None if gate is None else gate.transpose(1, 2)
    aside = None if gate is None else groups.product(inner, gate, None)
    hidden = describe(groups.product(inner, up, up_bias), aside)
    result = groups.product(hidden, down.transpose(1, 2) if down_transposed else down, down_bias)
    if norm is not None:
        result = post_norm(result, norm, norm_eps)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    result, scale = result.to(dtype), scale.to(dtype)
    if weigh_input:
        scale = torch.ones_like(scale)
    if rows is None:
        total = torch.mm(scale[None], result)
    else:
        total = result.new_zeros(x.shape[0], result.shape[1]).index_add_(0, rows, result * scale[:, None])
    return total.to(tokens.dtype).view(*tokens.shape[:-1], result.shape[1])


def routed_linear_torch(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`ad_moe::routed_linear` on packed tokens [1, T, D] or [1, T, K, D]. See there for the arguments."""
    groups = Groups.of(selected, weight.shape[0])
    choices, x = selected.shape[-1], tokens.flatten(0, -2)
    if tokens.dim() > selected.dim():
        inner = groups.pick(x)
    else:
        rows = groups.rows(choices)
        inner = x.expand(choices, -1) if rows is None else x[rows]
    result = groups.product(inner.to(weight.dtype), weight, None).to(tokens.dtype)
    if groups.order is not None:
        result = tokens.new_zeros(selected.numel(), weight.shape[1]).index_copy_(0, groups.order, result)
    return result.view(*selected.shape, weight.shape[1])


define_op(f"ad_moe::moe_torch({ARGUMENTS.format(star='')}) -> Tensor", moe_torch, moe_fake)
define_op(f"ad_moe::routed_linear_torch({LINEAR_ARGUMENTS}) -> Tensor", routed_linear_torch, linear_fake)
