"""The canonical ops: delta rules over one whole sequence, in plain torch. The truth that every kernel is held to."""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op
from ad_deltanet.chunked import delta_rule

NORM_EPS = 1e-6
"""Of the l2 norm of queries and keys, added to the sum of squares."""

_ARGUMENTS = "Tensor beta, *, float scale, bool l2norm=False) -> Tensor"
GATED_SCHEMA = f"ad_deltanet::gated_delta(Tensor query, Tensor key, Tensor value, Tensor? g, {_ARGUMENTS}"
KDA_SCHEMA = f"ad_deltanet::kda(Tensor query, Tensor key, Tensor value, Tensor g, {_ARGUMENTS}"

ROLES = {
    **dict.fromkeys(("query", "key", "value", "g", "beta"), Role.TOKEN),
    **dict.fromkeys(("scale", "l2norm"), Role.CONST),
}


def gated_delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float,
    l2norm: bool = False,
) -> torch.Tensor:
    """query, key [B, S, H, K], value [B, S, Hv, V], g (log of the decay, at most 0) and beta [B, S, Hv] -> [B, S, Hv, V], contiguous.

    Value head h reads query and key head h // (Hv / H). Without g nothing decays. With `l2norm`, queries and keys are brought to
    length 1 first. Half precision is computed in float32; the result has the dtype of `value`.
    """
    return _whole(query, key, value, None if g is None else g[..., None], beta, scale, l2norm)


def kda_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    l2norm: bool = False,
) -> torch.Tensor:
    """As `gated_delta_reference`, with a decay for each channel of the key: g [B, S, Hv, K]."""
    return _whole(query, key, value, g, beta, scale, l2norm)


def _whole(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor | None, beta: torch.Tensor, scale: float, l2norm: bool
) -> torch.Tensor:
    batch, _, heads, width = value.shape
    query, key = normalised(query, key, heads, scale, l2norm)
    dtype = query.dtype

    def flat(x: torch.Tensor) -> torch.Tensor:  # [B * Hv, S, ...]
        return x.to(dtype).transpose(1, 2).flatten(0, 1)

    state = query.new_zeros(batch * heads, query.shape[3], width)
    output, _ = delta_rule(flat(query), flat(key), flat(value), None if g is None else flat(g), flat(beta[..., None]), state)
    return value.new_empty(value.shape).copy_(output.unflatten(0, (batch, heads)).transpose(1, 2))


def normalised(query: torch.Tensor, key: torch.Tensor, heads: int, scale: float, l2norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """query (times `scale`) and key [..., H, K] in at least float32, brought to length 1 if asked, repeated to `heads` heads."""
    both = torch.stack((query, key)).to(torch.promote_types(query.dtype, torch.float32))  # one after the other would be twice the ops
    if l2norm:
        both.mul_(both.square().sum(-1, keepdim=True).add_(NORM_EPS).rsqrt_())
    both[0].mul_(scale)
    if heads != both.shape[-2]:
        both = both.unsqueeze(-2).expand(*both.shape[:-1], heads // both.shape[-2], both.shape[-1]).flatten(-3, -2)
    query, key = both
    return query, key


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, Hv, V], contiguous, of value's dtype."""
    return value.new_empty(value.shape)


gated_delta = define_op(GATED_SCHEMA, gated_delta_reference, _fake)
kda = define_op(KDA_SCHEMA, kda_reference, _fake)
