"""The canonical op: softmax attention over one whole sequence, in plain torch. The truth that every kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ad_attention.scores import bucket_table, first_visible, query_bias, score_bias
from ad_core.api import Role
from ad_core.graph.ops import define_op

ROW_BLOCK = 256
"""Query rows that are scored at once: no S x S matrix of a long sequence ever exists."""

SCHEMA = (
    "ad_attention::attention(Tensor query, Tensor key, Tensor value, *, float scale, int? window=None, int? chunk=None, "
    'float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? rel_bias=None, str rel_bias_rule="", '
    "Tensor? key_bias=None, Tensor? distance_bias=None, Tensor? query_sinks=None) -> Tensor"
)

ROLES = {
    "query": Role.TOKEN,
    "key": Role.TOKEN,
    "value": Role.TOKEN,
    "scale": Role.CONST,
    "window": Role.CONST,
    "chunk": Role.CONST,
    "softcap": Role.CONST,
    "sinks": Role.PARAM,
    "alibi_slopes": Role.PARAM,
    "rel_bias": Role.PARAM,
    "rel_bias_rule": Role.CONST,
    "key_bias": Role.TOKEN,
    "distance_bias": Role.TOKEN,
    "query_sinks": Role.TOKEN,
}


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    rel_bias: torch.Tensor | None = None,
    rel_bias_rule: str = "",
    key_bias: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    query_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention: query [B, S, H, D], key [B, S, G, D], value [B, S, G, Dv] -> [B, S, H, Dv], contiguous.

    Head h reads key/value head h // (H / G). The score of (i, j) is query_i . key_j * scale, then
    `softcap` * tanh(score / `softcap`), then the biases: `alibi_slopes` [H] * (j - i), `rel_bias` [H, buckets] at the
    bucket that `rel_bias_rule` gives to i - j, `key_bias` [B, S, G] at j, `distance_bias` [B, S, H, E] of query i at i - j,
    and nothing from distance E on. Seen are j <= i, of these with `window` only j > i - window and with `chunk` only
    j // chunk == i // chunk. `sinks` [H] is one more score a row, with no value; so is `query_sinks` [B, S, H], which each
    query has of its own. Half precision is computed in float32.
    """
    batch, length, heads, _ = query.shape
    groups = key.shape[2]
    limits = (x for x in (window, chunk) if x is not None)
    modifiers = (softcap, sinks, alibi_slopes, rel_bias, key_bias, distance_bias, query_sinks)
    plain = all(x is None for x in modifiers) and all(x >= length for x in limits)
    if plain and key.shape[3] == value.shape[3]:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if groups != heads:
            k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).contiguous()
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).reshape(batch, length, groups, -1, query.shape[3]).permute(0, 2, 3, 1, 4)  # [B, G, H/G, S, D]
    k, v = (x.to(dtype).transpose(1, 2)[:, :, None] for x in (key, value))  # [B, G, 1, S, D]
    positions = torch.arange(length, device=query.device)
    buckets = None if rel_bias is None else bucket_table(rel_bias, rel_bias_rule)
    out = query.new_empty(batch, length, heads, value.shape[3])
    for start in range(0, length, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, length)
        first = first_visible(start, window, chunk)
        scores = q[..., start:stop, :] @ k[..., first:stop, :].transpose(-1, -2) * scale  # [B, G, H/G, rows, keys]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if key_bias is not None:
            scores = scores + key_bias[:, first:stop].to(dtype).transpose(1, 2)[:, :, None, None]
        if distance_bias is not None:
            own = query_bias(distance_bias[:, start:stop].to(dtype), positions[start:stop], positions[first:stop])
            scores = scores + own.unflatten(1, (groups, -1))
        bias = score_bias(
            positions[start:stop],
            positions[first:stop],
            dtype,
            window=window,
            chunk=chunk,
            alibi_slopes=alibi_slopes,
            rel_bias=rel_bias,
            buckets=buckets,
        )
        scores = scores + (bias if bias.dim() == 2 else bias.unflatten(0, (groups, -1)))
        columns = [scores]
        if sinks is not None:
            columns.append(sinks.to(dtype).view(groups, -1, 1, 1).expand(batch, -1, -1, stop - start, 1))
        if query_sinks is not None:
            columns.append(query_sinks[:, start:stop].to(dtype).transpose(1, 2).unflatten(1, (groups, -1))[..., None])
        weights = torch.cat(columns, -1).softmax(-1)[..., : stop - first] if len(columns) > 1 else scores.softmax(-1)
        out[:, start:stop] = (weights @ v[..., first:stop, :]).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out


def attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    """[B, S, H, Dv], contiguous, of the query's dtype."""
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


attention = define_op(SCHEMA, attention_reference, attention_fake)
