"""A linear layer of which every token chooses its weights: what is left of experts when something lies between their two projections."""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op

LINEAR_ARGUMENTS = "Tensor tokens, Tensor selected, Tensor weight"
LINEAR_ROLES = {"tokens": Role.TOKEN, "selected": Role.TOKEN, "weight": Role.PARAM}


def linear_reference(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """tokens [B, S, D] (or [B, S, K, D], one for each choice), selected [B, S, K] integer, weight [E, O, D] -> [B, S, K, O], contiguous,
    of the tokens' dtype: each choice's token times the weight of its expert. A choice outside of 0 to E-1 gives zero."""
    x = tokens if tokens.dim() > selected.dim() else tokens[..., None, :].expand(*selected.shape, -1)
    out = tokens.new_zeros(*selected.shape, weight.shape[1])
    for expert in selected.unique().tolist():
        if 0 <= expert < weight.shape[0]:
            mine = selected == expert
            out[mine] = (x[mine].to(weight.dtype) @ weight[expert].t()).to(out.dtype)
    return out


def linear_fake(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, S, K, O], contiguous, of the tokens' dtype."""
    return tokens.new_empty(*selected.shape, weight.shape[1])


routed_linear = define_op(f"ad_moe::routed_linear({LINEAR_ARGUMENTS}) -> Tensor", linear_reference, linear_fake)
