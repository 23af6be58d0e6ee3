"""The kernel in plain torch: choices sorted by expert, one product for each expert that is chosen. Reads no other expert's weights."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import Kernel
from ad_core.graph.ops import define_op
from ad_moe.gating import Gating
from ad_moe.op import ARGUMENTS, moe_fake, post_norm


class TorchExperts(Kernel):
    """Any device. On the CPU the chosen experts are read back to the host, on others too: a graph of a GPU cannot hold it."""

    name = "moe.torch"
    target = "ad_moe::moe"
    op = "ad_moe::moe_torch"
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
    num_experts, choices = up.shape[0], selected.shape[-1]
    x = tokens.flatten(0, -2)
    experts, order = selected.flatten().sort()
    groups = _groups(experts.tolist(), num_experts)
    first, last = (groups[0][1], groups[-1][2]) if groups else (0, 0)
    order = order[first:last]  # [N]: choices of real experts, sorted by expert
    rows = order if choices == 1 else order // choices
    scale = weights.flatten()[order, None]
    inner = x[rows]
    if weigh_input:
        inner = inner * scale.to(inner.dtype)
    inner = inner.to(up.dtype)
    groups = [(expert, start - first, stop - first) for expert, start, stop in groups]
    aside = None if gate is None else _grouped(inner, gate, None, up_transposed, groups)
    hidden = describe(_grouped(inner, up, up_bias, up_transposed, groups), aside)
    result = _grouped(hidden, down, down_bias, down_transposed, groups)
    if norm is not None:
        result = post_norm(result, norm, norm_eps)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    result = result.to(dtype) if weigh_input else result * scale.to(dtype)
    total = torch.zeros(x.shape[0], result.shape[1], dtype=dtype, device=tokens.device).index_add_(0, rows, result)
    return total.to(tokens.dtype).view(*tokens.shape[:-1], result.shape[1])


def _groups(experts: list[int], num_experts: int) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of every expert that occurs in the sorted list; ids that are no expert's are left out."""
    groups: list[tuple[int, int, int]] = []
    start = 0
    for place in range(1, len(experts) + 1):  # over choices, as a loop in Python: their products cost thousands of times as much
        if place == len(experts) or experts[place] != experts[start]:
            if 0 <= experts[start] < num_experts:
                groups.append((experts[start], start, place))
            start = place
    return groups


def _grouped(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool, groups: list[tuple[int, int, int]]
) -> torch.Tensor:
    """Rows [N, In], sorted by expert, each times its expert's weight -> [N, Out]."""
    out = x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])
    for expert, start, stop in groups:
        one = weight[expert] if transposed else weight[expert].t()
        if bias is None:
            torch.mm(x[start:stop], one, out=out[start:stop])
        else:
            torch.addmm(bias[expert], x[start:stop], one, out=out[start:stop])
    return out


define_op(f"ad_moe::moe_torch({ARGUMENTS.format(star='')}) -> Tensor", moe_torch, moe_fake)
