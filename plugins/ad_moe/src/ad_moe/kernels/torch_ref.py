"""The kernels in plain torch: choices sorted by expert, one product for each expert that is chosen. No other expert's weights are read.

Measured on a CPU with bfloat16 matrix instructions, 24 experts of 2048 x 1536: `mm` into a part of the result is as fast as
`grouped_mm` (which is such a loop there) and as `linear`, and ten times as fast as gathering the experts' weights for one `bmm`.
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
    scale = weights.flatten()[groups.order, None]
    x = tokens.flatten(0, -2)
    inner = x[rows]
    if weigh_input:
        inner = inner * scale.to(inner.dtype)
    inner = inner.to(up.dtype)
    aside = None if gate is None else groups.product(inner, gate, None, up_transposed)
    hidden = describe(groups.product(inner, up, up_bias, up_transposed), aside)
    result = groups.product(hidden, down, down_bias, down_transposed)
    if norm is not None:
        result = post_norm(result, norm, norm_eps)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    result = result.to(dtype) if weigh_input else result * scale.to(dtype)
    total = torch.zeros(x.shape[0], result.shape[1], dtype=dtype, device=tokens.device).index_add_(0, rows, result)
    return total.to(tokens.dtype).view(*tokens.shape[:-1], result.shape[1])


def routed_linear_torch(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`ad_moe::routed_linear` on packed tokens [1, T, D] or [1, T, K, D]. See there for the arguments."""
    groups = Groups.of(selected, weight.shape[0])
    x = tokens.flatten(0, -2)
    inner = x[groups.order if tokens.dim() > selected.dim() else groups.rows(selected.shape[-1])].to(weight.dtype)
    out = tokens.new_zeros(selected.numel(), weight.shape[1])
    out[groups.order] = groups.product(inner, weight, None, False).to(out.dtype)
    return out.view(*selected.shape, weight.shape[1])


define_op(f"ad_moe::moe_torch({ARGUMENTS.format(star='')}) -> Tensor", moe_torch, moe_fake)
define_op(f"ad_moe::routed_linear_torch({LINEAR_ARGUMENTS}) -> Tensor", routed_linear_torch, linear_fake)
