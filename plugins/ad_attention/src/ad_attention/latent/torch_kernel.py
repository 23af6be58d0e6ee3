"""Latent attention over paged latents in plain torch.

Decodes read latents as they lie: the key half of the up-projection is applied to the query instead ("absorbed"), the value half to the
weighted latent, so all heads share one key of R + P features. Chunks do the same or expand their keys, whichever is less work. Where
each token has its own selection, each is computed like a decode over just these rows.

R latent features, P rope features shared by all heads, N and V key and value features of a head.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ad_attention.kernels.row_plan import GROUP_ROWS, RowPlan, plan_rows, row_buffers
from ad_attention.kernels.sinks import softmax_with_sinks
from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::mla_torch(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor up_weight, float scale, int? window, "
    "Tensor? sinks, Tensor? selected, bool append, Tensor(a!) latent_pages, Tensor page_table, Tensor positions, Tensor plan, "
    "Tensor records, Tensor slots, Tensor rows, Tensor bounds, Tensor index) -> Tensor"
)

BLOCK_SCORES = 1 << 21
"""The most scores that a block of query rows may have: they should stay in a cache."""


class _Up:
    """The up-projection [H * (N + V), R] by heads."""

    def __init__(self, weight: torch.Tensor, heads: int, features: int):
        by_head = weight.view(heads, -1, weight.shape[1])
        self.key, self.value = by_head[:, :features], by_head[:, features:]  # [H, N, R], [H, V, R]

    def absorb(self, q_nope: torch.Tensor, q_rope: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """Queries [n, H, N] and [n, H, P] -> [n, H, R + P], scaled, against latents and rope features as they lie."""
        nope = torch.bmm(q_nope.transpose(0, 1), self.key).transpose(0, 1)
        return torch.cat([nope.to(dtype), q_rope.to(dtype)], -1).mul_(scale)

    def project(self, mixed: torch.Tensor) -> torch.Tensor:
        """Weighted latents [n, H, R] -> [n, H, V]."""
        return torch.bmm(mixed.transpose(0, 1).to(self.value.dtype), self.value.transpose(1, 2)).transpose(0, 1)


def _mla(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_weight: torch.Tensor,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
    selected: torch.Tensor | None,
    append: bool,
    latent_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: q_nope [1, T, H, N] ... -> [1, T, H, V]. Writes latent and k_rope of the step's tokens as one row
    each to `latent_pages` if `append`, and then reads the sequences from there. Rows past the batch's tokens are zero."""
    step = RowPlan(plan, records, slots, bounds, index)
    heads, features = q_nope.shape[2:]
    up = _Up(up_weight, heads, features)
    entries = torch.cat([latent[0], k_rope[0]], -1)
    if append:
        step.write(latent_pages, entries)
    pool = latent_pages.flatten(0, 1)
    dtype = torch.promote_types(q_nope.dtype, torch.float32)
    out = q_nope.new_empty(1, q_nope.shape[1], heads, up.value.shape[1])
    if selected is not None:
        block = max(1, GROUP_ROWS // selected.shape[2])
        for start in range(0, step.tokens, block):
            part = slice(start, min(start + block, step.tokens))
            wanted, last = selected[0, part], positions[part, None]
            lowest = torch.zeros_like(last) if window is None else (last - window + 1).clamp_(min=0)
            hidden = (wanted < lowest) | (wanted > last)
            found = step.slots_at(torch.minimum(wanted.clamp(min=0), last).maximum(lowest), rows[part], page_table)
            keys = pool.index_select(0, found.flatten()).view(*found.shape, -1).to(dtype)
            query = up.absorb(q_nope[0, part], q_rope[0, part], scale, dtype)
            out[0, part] = up.project(_attend(query, keys, hidden, sinks, latent.shape[2]))
    else:
        for group in step.groups:
            part = slice(group.start, group.start + group.size)
            found = step.group_slots(group, page_table)
            keys = pool.index_select(0, found).view(group.size, group.length, -1).to(dtype)
            query = up.absorb(q_nope[0, part], q_rope[0, part], scale, dtype)
            out[0, part] = up.project(_attend(query, keys, step.hidden(group), sinks, latent.shape[2]))
        for chunk in step.prefills:
            new = slice(chunk.token, chunk.token + chunk.size)
            found = step.context_slots(chunk, page_table)
            keys = torch.cat([pool.index_select(0, found), entries[new]]) if chunk.context > chunk.first else entries[new]
            given = (q_nope[0, new], q_rope[0, new], keys, up_weight, up)
            out[0, new] = _chunk(*given, chunk.context - chunk.first, scale, window, sinks)
    if step.tokens < out.shape[1]:
        out[0, step.tokens :].zero_()
    return out


def _attend(query: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None, sinks: torch.Tensor | None, width: int) -> torch.Tensor:
    """query [n, H, R + P], keys [n, L, R + P] of each -> weighted latents [n, H, R]."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    if hidden is not None:
        scores.masked_fill_(hidden[:, None], -torch.inf)
    return torch.bmm(softmax_with_sinks(scores, sinks), keys[..., :width])


def _chunk(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    keys: torch.Tensor,
    up_weight: torch.Tensor,
    up: _Up,
    before: int,
    scale: float,
    window: int | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """m tokens of one sequence, q_nope [m, H, N], over keys [before + m, R + P] -> [m, H, V]."""
    m, heads, features = q_nope.shape
    length, width = keys.shape[0], up_weight.shape[1]
    dtype = torch.promote_types(q_nope.dtype, torch.float32)
    expanded = length * width * up_weight.shape[0] + m * length * heads * (keys.shape[1] - width + features + up.value.shape[1])
    absorbed = 2 * m * width * up_weight.shape[0] + m * length * heads * (keys.shape[1] + width)
    expand = expanded < absorbed
    shared = keys.to(dtype)
    if expand:
        own = torch.nn.functional.linear(keys[:, :width], up_weight).to(dtype).view(length, heads, -1).transpose(0, 1)  # [H, L, N + V]
        query, rope = (x.to(dtype).mul(scale).transpose(0, 1) for x in (q_nope, q_rope))  # [H, m, ...]
    else:
        query = up.absorb(q_nope, q_rope, scale, dtype)
    steps = torch.arange(length, device=keys.device)
    out = q_nope.new_empty(m, heads, up.value.shape[1])
    size = max(16, BLOCK_SCORES // (heads * length))
    for start in range(0, m, size):
        stop = min(start + size, m)
        low = 0 if window is None else max(0, before + start - window + 1)
        seen, rows = slice(low, before + stop), steps[before + start : before + stop, None]
        blocked = steps[seen] > rows
        if window is not None:
            blocked |= steps[seen] <= rows - window
        if expand:
            scores = torch.bmm(query[:, start:stop], own[:, seen, :features].transpose(1, 2))
            scores += rope[:, start:stop] @ shared[seen, width:].t()
            weights = softmax_with_sinks(scores.masked_fill_(blocked, -torch.inf).transpose(0, 1), sinks).transpose(0, 1)
            out[start:stop] = torch.bmm(weights, own[:, seen, features:]).transpose(0, 1)
        else:
            scores = (query[start:stop] @ shared[seen].t()).masked_fill_(blocked[:, None], -torch.inf)
            out[start:stop] = up.project(softmax_with_sinks(scores, sinks) @ shared[seen, :width])
    return out


def _fake(q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, up_weight: torch.Tensor, *_: object):
    heads, features = q_nope.shape[2:]
    return q_nope.new_empty(*q_nope.shape[:2], heads, up_weight.shape[0] // heads - features)


mla_torch = define_op(SCHEMA, _mla, _fake)


class TorchLatent(Kernel):
    """Decodes absorbed, chunks absorbed or expanded."""

    name = "attention.mla.torch"
    target = "ad_attention::mla"
    op = "ad_attention::mla_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return row_buffers(limits)

    def group_key(self, call: OpCall) -> Hashable:
        return call["window"]

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_rows(batch, call["window"], out)
