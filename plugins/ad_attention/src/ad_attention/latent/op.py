"""The canonical op of latent attention: as if keys and values had been expanded, over one whole sequence."""

from __future__ import annotations

import torch

from ad_attention.scores import first_visible, score_bias
from ad_core.api import Role
from ad_core.graph.ops import define_op

ROW_BLOCK = 256
"""Query rows that are scored at once: no S x S matrix of a long sequence ever exists."""

SCHEMA = (
    "ad_attention::mla(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor up_weight, *, float scale, "
    "int? window=None, Tensor? sinks=None, Tensor? selected=None) -> Tensor"
)

ROLES = {
    "q_nope": Role.TOKEN,
    "q_rope": Role.TOKEN,
    "latent": Role.TOKEN,
    "k_rope": Role.TOKEN,
    "up_weight": Role.PARAM,
    "scale": Role.CONST,
    "window": Role.CONST,
    "sinks": Role.PARAM,
    "selected": Role.TOKEN,
}


def mla_reference(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_weight: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of q_nope [B, S, H, N] and q_rope [B, S, H, P] over latent [B, S, R] and k_rope [B, S, P] -> [B, S, H, V].

    up_weight [H * (N + V), R] makes of a latent, head by head, N key features and V value features; a key is these N and k_rope,
    which all heads share. The score is (q_nope . key + q_rope . k_rope) * scale. Seen are j <= i, of these with `window` only
    j > i - window, with `selected` [B, S, K] only the positions that it lists for i (negative: none). `sinks` [H] is one more
    score a row, with no value. Half precision is computed in float32. DeepSeek-AI (2024), arXiv 2405.04434.
    """
    batch, length, heads, features = q_nope.shape
    dtype = torch.promote_types(q_nope.dtype, torch.float32)
    up = torch.nn.functional.linear(latent, up_weight).to(dtype).view(batch, length, heads, -1).transpose(1, 2)  # [B, H, S, N + V]
    keys, values = up[..., :features], up[..., features:]
    shared = k_rope.to(dtype)[:, None]
    nope, rope = (x.to(dtype).transpose(1, 2) for x in (q_nope, q_rope))
    positions = torch.arange(length, device=latent.device)
    out = q_nope.new_empty(batch, length, heads, values.shape[-1])
    for start in range(0, length, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, length)
        first = first_visible(start, window, None)
        seen = slice(first, stop)
        scores = nope[:, :, start:stop] @ keys[:, :, seen].transpose(-1, -2) + rope[:, :, start:stop] @ shared[:, :, seen].transpose(-1, -2)
        scores = scores * scale + score_bias(positions[start:stop], positions[seen], dtype, window=window)
        if selected is not None:
            chosen = chosen_keys(selected[:, start:stop], length)[..., seen]
            scores = scores.masked_fill(~chosen[:, None], -torch.inf)
        if sinks is not None:
            column = sinks.to(dtype).view(1, -1, 1, 1).expand(batch, -1, stop - start, 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        out[:, start:stop] = (weights @ values[:, :, seen]).transpose(1, 2)
    return out


def chosen_keys(selected: torch.Tensor, length: int) -> torch.Tensor:
    """[B, n, length] bool of positions [B, n, K]: which are listed. Those that do not exist are nobody."""
    places = torch.where((selected < 0) | (selected >= length), length, selected)
    chosen = torch.zeros(*selected.shape[:2], length + 1, dtype=torch.bool, device=selected.device)
    return chosen.scatter_(-1, places, True)[..., :length]


def mla_fake(q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, up_weight: torch.Tensor, **_: object):
    """[B, S, H, V], contiguous, of the query's dtype."""
    heads, features = q_nope.shape[2:]
    return q_nope.new_empty(*q_nope.shape[:2], heads, up_weight.shape[0] // heads - features)


mla = define_op(SCHEMA, mla_reference, mla_fake)
