"""Attention of decode groups and of prefill chunks, in torch. No position is looked up here: keys come gathered.

n decodes, m new tokens, L keys, R = H / G query heads share a key/value head; heads are kept apart as [G, R].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ad_attention.kernels.torch_plan import BAGGED, FUSED, SPLIT
from ad_attention.scores import first_visible, query_bias, score_bias

FUSED_ROWS = 64
"""Chunks shorter than this are one fused call on the CPU; longer ones are faster, and more exact, in blocks of plain products."""
BLOCK_ROWS, BLOCK_SCORES = 64, 1 << 21
"""Rows of such a block, and the most scores that it may have: they should stay in a cache."""

# Called directly: it returns the logarithm of the sum, and saves the choice of a backend, which costs as much as a decode's layer.
fused_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Modifiers(NamedTuple):
    """The canonical op's arguments beside query, key and value. `sinks` is [H], or [n, H] of the queries that are computed, whose
    biases by distance `distance_bias` [n, H, E] are."""

    scale: float
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    rel_bias: torch.Tensor | None
    buckets: torch.Tensor | None
    distance_bias: torch.Tensor | None = None

    def of(self, rows: slice | torch.Tensor) -> Modifiers:
        """Those of some of the queries."""
        sinks, bias = self.sinks, self.distance_bias
        if bias is None and (sinks is None or sinks.dim() == 1):
            return self
        return self._replace(
            sinks=sinks if sinks is None or sinks.dim() == 1 else sinks[rows], distance_bias=bias if bias is None else bias[rows]
        )


class Bagged(NamedTuple):
    """Values that are not gathered: `rows` [slots * G, Dv] of the pool, of which `wanted` [n, G, 1, L] names some."""

    rows: torch.Tensor
    wanted: torch.Tensor

    def weighted(self, shares: torch.Tensor) -> torch.Tensor:
        """The sums of values by `shares` [n, G, R, L] -> [n * G * R, Dv], each rounded once."""
        total, length = shares.numel(), shares.shape[-1]
        starts = torch.arange(0, total, length, dtype=self.wanted.dtype, device=shares.device)
        index = self.wanted.expand(shares.shape).reshape(-1)
        return torch.embedding_bag(self.rows, index, starts, False, 0, False, shares.reshape(-1), False)[0]


def decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | Bagged, biases: Sequence[torch.Tensor], given: Modifiers, mode: int
) -> torch.Tensor:
    """query [n, H, D], keys [n, G, L, D], values [n, G, L, Dv] -> [n, H, Dv]. Each of `biases` broadcasts to [n, G, R, L].

    FUSED: one call, half precision, no softcap. EXACT: batched products in float32 (or float64). SPLIT: batched bfloat16
    products, which write bfloat16; so that scores keep float32's meaning, a second product gives what the first one rounded
    away. Rounding the scores alone makes a model's bfloat16 logits five per cent worse. BAGGED: the same with values that were
    not gathered.
    """
    n, H, D = query.shape
    G, L = keys.shape[1:3]
    if mode == FUSED:
        assert isinstance(values, torch.Tensor)
        bias = sum(biases[1:], start=biases[0]) if biases else None
        out, lse = fused_cpu(query.view(n, G, H // G, D), keys, values, 0.0, False, attn_mask=bias, scale=given.scale)
        out = out if given.sinks is None else _sink(out, lse[..., None], given.sinks)
        return out.reshape(n, H, -1)
    flat_keys = keys.reshape(n * G, L, D).transpose(1, 2)
    factor = given.scale if given.softcap is None else given.scale / given.softcap
    if mode in (SPLIT, BAGGED):
        rows = query.reshape(n * G, -1, D)
        high = torch.bmm(rows, flat_keys)
        low = torch.baddbmm(high, rows, flat_keys, beta=-1)
        scores = high.float().add_(low).mul_(factor)
    else:
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = torch.bmm(query.to(dtype).mul(factor).reshape(n * G, -1, D), flat_keys.to(dtype))
    scores = scores.view(n, G, -1, L)
    if given.softcap is not None:
        scores.tanh_().mul_(given.softcap)
    for bias in biases:
        scores.add_(bias)
    shares = scores.softmax(-1)
    if isinstance(values, Bagged):
        out = values.weighted(shares.to(query.dtype)).view(n, G, H // G, -1)
    else:
        flat_values = values.reshape(n * G, L, -1).to(query.dtype if mode == SPLIT else scores.dtype)
        out = torch.bmm(shares.to(flat_values.dtype).view(n * G, -1, L), flat_values).view(n, G, H // G, -1)
    if given.sinks is not None:
        out = _sink(out, scores.logsumexp(-1, keepdim=True), given.sinks)
    return out.view(n, H, -1).to(query.dtype)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor] | None,
    key_bias: torch.Tensor | None,
    context: int,
    given: Modifiers,
) -> torch.Tensor:
    """query [m, H, D], key [m, G, D], value [m, G, Dv]: m tokens from position `context` on -> [m, H, Dv].

    `cached` are the visible keys [G, c, D] and values [G, c, Dv] just before them, None if there are none. `key_bias`
    [c + m, G] covers both.
    """
    m = query.shape[0]
    biases = (given.alibi_slopes, given.rel_bias, key_bias, given.distance_bias)
    biased = any(bias is not None for bias in biases)
    first, last = (first_visible(position, given.window, given.chunk) for position in (context, context + m - 1))
    uniform = first == last and not biased  # all rows see the same context, and then each other's past
    plain = uniform and given.softcap is None and key.shape[2] == value.shape[2]
    if plain and query.is_cpu and m < FUSED_ROWS:
        return _prefill_fused(query, key, value, cached, given)
    if plain and not query.is_cpu and cached is None and given.sinks is None:
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=given.scale, enable_gqa=k.shape[1] != q.shape[1])
        return out[0].transpose(0, 1).contiguous()
    return _prefill_blocks(query, key, value, cached, key_bias, context, uniform, given)


def _prefill_fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cached: tuple[torch.Tensor, torch.Tensor] | None, given: Modifiers
) -> torch.Tensor:
    """Context and chunk are two calls without a mask, joined by their sums. The chunk's keys are few enough to be repeated for each
    query head; those of the context are not, there the query heads of a group are the batch, over which keys have stride 0."""
    m, H, D = query.shape
    G, R = key.shape[1], H // key.shape[1]
    k, v = (x.transpose(0, 1)[:, None].expand(-1, R, -1, -1).reshape(1, H, m, D) for x in (key, value))
    out, lse = fused_cpu(query.transpose(0, 1)[None], k, v, 0.0, True, attn_mask=None, scale=given.scale)
    out, lse = out[0].transpose(0, 1).view(m, G, R, D), lse[0].view(G, R, m).permute(2, 0, 1)
    if cached is not None:
        rows = query.view(m, G, R, D).permute(2, 1, 0, 3)
        before, before_lse = fused_cpu(rows, *(x.expand(R, -1, -1, -1) for x in cached), 0.0, False, attn_mask=None, scale=given.scale)
        before, before_lse = before.permute(2, 1, 0, 3), before_lse.permute(2, 1, 0)
        share = torch.sigmoid(before_lse - lse)[..., None]
        out = out.to(share.dtype).lerp(before.to(share.dtype), share)
        lse = torch.logaddexp(lse, before_lse)
    if given.sinks is not None:
        out = _sink(out, lse[..., None], given.sinks)
    return out.reshape(m, H, D).to(query.dtype)


def _prefill_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor] | None,
    key_bias: torch.Tensor | None,
    context: int,
    uniform: bool,
    given: Modifiers,
) -> torch.Tensor:
    """Blocks of query rows against the keys that any of them sees, in float32 (or float64). `uniform`: only the diagonal is masked."""
    m, H, D = query.shape
    G, Dv = value.shape[1:]
    dtype = torch.promote_types(query.dtype, torch.float32)
    k, v = key.transpose(0, 1), value.transpose(0, 1)
    if cached is not None:
        k, v = torch.cat([cached[0], k], 1), torch.cat([cached[1], v], 1)
    k, v = k.to(dtype), v.to(dtype)  # [G, L, D]
    factor = given.scale if given.softcap is None else given.scale / given.softcap
    rows = query.to(dtype).mul(factor).unflatten(1, (G, -1)).permute(1, 2, 0, 3)  # [G, R, m, D]
    out = query.new_empty(m, G, H // G, Dv)
    origin = context + m - k.shape[1]  # the position of the first key
    size = max(16, min(BLOCK_ROWS, BLOCK_SCORES // (H * k.shape[1])))
    diagonal = torch.full((size, size), -torch.inf, dtype=dtype, device=query.device).triu_(1) if uniform else None
    for start in range(0, m, size):
        stop = min(start + size, m)
        low, high = first_visible(context + start, given.window, given.chunk), context + stop
        seen = slice(low - origin, high - origin)
        scores = torch.bmm(rows[:, :, start:stop].reshape(G, -1, D), k[:, seen].transpose(1, 2)).view(G, -1, stop - start, high - low)
        if given.softcap is not None:
            scores.tanh_().mul_(given.softcap)
        if key_bias is not None:
            scores.add_(key_bias[seen].t()[:, None, None])
        if diagonal is not None:
            scores[..., start - stop :].add_(diagonal[: stop - start, : stop - start])
        else:
            i, j = (torch.arange(begin, high, device=query.device) for begin in (context + start, low))
            bias = score_bias(
                i,
                j,
                dtype,
                window=given.window,
                chunk=given.chunk,
                alibi_slopes=given.alibi_slopes,
                rel_bias=given.rel_bias,
                buckets=given.buckets,
            )
            scores.add_(bias if bias.dim() == 2 else bias.unflatten(0, (G, -1)))
            if given.distance_bias is not None:
                scores.add_(query_bias(given.distance_bias[start:stop].to(dtype), i, j).unflatten(0, (G, -1)))
        block = torch.bmm(scores.softmax(-1).view(G, -1, high - low), v[:, seen]).view(G, -1, stop - start, Dv).permute(2, 0, 1, 3)
        if given.sinks is not None:
            sinks = given.sinks if given.sinks.dim() == 1 else given.sinks[start:stop]
            block = _sink(block, scores.logsumexp(-1, keepdim=True).permute(2, 0, 1, 3), sinks)
        out[start:stop] = block
    return out.view(m, H, Dv)


def _sink(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """One more score a head, which takes its share of the sum and gives no value. `out` [n, G, R, Dv], `lse` [n, G, R, 1], `sinks`
    [H] or [n, H]."""
    return out * torch.sigmoid(lse - sinks.to(lse.dtype).reshape(*sinks.shape[:-1], *lse.shape[-3:]))
