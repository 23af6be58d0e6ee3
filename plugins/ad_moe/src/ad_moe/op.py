"""The canonical op: routed experts over a whole sequence, in plain torch. The truth that every kernel is held to.

Legend: B sequences, S tokens each, T = B * S; D model width, O output width, I inner width, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op
from ad_moe.gating import Gating

ARGUMENTS = (
    "Tensor tokens, Tensor selected, Tensor weights, Tensor up, Tensor down, {star}Tensor? gate=None, Tensor? up_bias=None, "
    "Tensor? down_bias=None, Tensor? norm=None, float norm_eps=0.0, bool up_transposed=False, bool down_transposed=False, "
    'bool weigh_input=False, str activation="silu", str layout="concatenated", float alpha=1.0, float? limit=None, '
    "bool limit_activated=False, float offset=0.0, float? gate_cap=None, float? up_cap=None"
)
"""Of the canonical op and of every kernel's: they are told apart by name only."""

ROLES = {
    **dict.fromkeys(("tokens", "selected", "weights"), Role.TOKEN),
    **dict.fromkeys(("up", "down", "gate", "up_bias", "down_bias", "norm"), Role.PARAM),
    **dict.fromkeys(("norm_eps", "up_transposed", "down_transposed", "weigh_input"), Role.CONST),
    **dict.fromkeys(("activation", "layout", "alpha", "limit", "limit_activated", "offset", "gate_cap", "up_cap"), Role.CONST),
}

CALL_CONSTANTS = ("activation", "layout", "alpha", "limit", "limit_activated", "offset", "gate_cap", "up_cap")
"""The arguments that describe the gating."""


def moe_reference(
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    up_transposed: bool = False,
    down_transposed: bool = False,
    weigh_input: bool = False,
    **gating: Any,
) -> torch.Tensor:
    """Routed experts: tokens [B, S, D], selected [B, S, K] integer, weights [B, S, K] -> [B, S, O], contiguous, of the tokens' dtype.

    A token's result is the sum over its K choices of weight * expert(token); a choice outside of 0 to E-1 counts nothing. An
    expert is down @ gating(up @ token): `up` [E, 2I, D] ([E, I, D] without a gate or with `gate` [E, I, D] apart), `down` [E, O, I],
    both with their last dimensions exchanged if transposed, `up_bias` [E, 2I], `down_bias` [E, O]. `norm` [O]: what the
    expert gives is multiplied with it and then divided by its root mean square. `weigh_input`: the weight multiplies the token
    and not the result. What gating does see `ad_moe.gating`. The projections round to the tokens' dtype, sums are in float32.
    """
    describe = Gating(**gating)
    choices = selected.shape[-1]
    x, ids = tokens.flatten(0, -2), selected.reshape(-1, choices)
    scale = weights.reshape(-1, choices)
    width = down.shape[2] if down_transposed else down.shape[1]
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    total = torch.zeros(x.shape[0], width, dtype=dtype, device=tokens.device)
    for expert in ids.unique().tolist():
        if not 0 <= expert < up.shape[0]:
            continue
        rows, choice = (ids == expert).nonzero(as_tuple=True)
        mine = scale[rows, choice, None]
        inner = x[rows] * mine.to(x.dtype) if weigh_input else x[rows]
        aside = None if gate is None else _project(inner, gate[expert], None, up_transposed)
        hidden = describe(_project(inner, up[expert], None if up_bias is None else up_bias[expert], up_transposed), aside)
        result = _project(hidden, down[expert], None if down_bias is None else down_bias[expert], down_transposed)
        if norm is not None:
            result = post_norm(result, norm, norm_eps)
        total.index_add_(0, rows, result.to(dtype) if weigh_input else result.to(dtype) * mine.to(dtype))
    return total.to(tokens.dtype).view(*tokens.shape[:-1], width)


def post_norm(result: torch.Tensor, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """[N, O] scaled by `norm` [O], rounded, and then divided by its root mean square over O, computed in float32."""
    dtype = torch.promote_types(result.dtype, torch.float32)
    scaled = (result.to(dtype) * norm.to(dtype)).to(result.dtype).to(dtype)
    return (scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps)).to(result.dtype)


def moe_fake(
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    *args: Any,
    down_transposed: bool = False,
    **_: Any,
) -> torch.Tensor:
    """[B, S, O], contiguous, of the tokens' dtype."""
    transposed = args[6] if len(args) > 6 else down_transposed  # a kernel's op has no keyword-only arguments
    return tokens.new_empty(*tokens.shape[:-1], down.shape[2] if transposed else down.shape[1])


def _project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """x [N, In] times one expert's weight, [Out, In] or, if transposed, [In, Out]."""
    result = x.to(weight.dtype) @ (weight if transposed else weight.t())
    return result if bias is None else result + bias


moe = define_op(f"ad_moe::moe({ARGUMENTS.format(star='*, ')}) -> Tensor", moe_reference, moe_fake)
