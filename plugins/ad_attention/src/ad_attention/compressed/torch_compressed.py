"""Attention over recent tokens in a ring and over paged entries, in plain torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ad_attention.kernels.row_plan import Group, Prefill, RowPlan, plan_rows, row_buffers
from ad_attention.kernels.sinks import softmax_with_sinks
from ad_attention.latent.op import chosen_keys
from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::compressed_torch(Tensor query, Tensor key, Tensor entry, Tensor? selected, Tensor? sinks, float scale, int window, "
    "int every, Tensor(a!) recent, Tensor(b!) entry_pages, Tensor page_table, Tensor positions, Tensor state_slots, Tensor plan, "
    "Tensor records, Tensor slots, Tensor rows, Tensor bounds, Tensor index, Tensor? ends) -> Tensor"
)

BLOCK_SCORES = 1 << 21
"""The most scores that a block of query rows may have: they should stay in a cache."""


def _compressed(
    query: torch.Tensor,
    key: torch.Tensor,
    entry: torch.Tensor,
    selected: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    every: int,
    recent: torch.Tensor,
    entry_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    state_slots: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """The canonical op on packed tokens: query [1, T, H, D], key and entry [1, T, D] -> [1, T, H, D].

    Writes the step's keys to their sequences' rings, `recent` [slots, window, D], and the entries of blocks that end to `entry_pages`
    [pages, entries, D]. Rows past the batch's tokens are zero.
    """
    step = RowPlan(plan, records, slots, bounds, index, ends)
    step.write(entry_pages, entry[0])
    pool, states = entry_pages.flatten(0, 1), state_slots.long()
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)

    def decode(group: Group) -> None:
        part = slice(group.start, group.start + group.size)
        now = positions[part, None]
        ring = recent.index_select(0, states[part])  # [n, window, D]
        ring.scatter_(1, (now % window)[:, :, None].expand(-1, -1, ring.shape[2]), key[0, part, None])
        recent.index_copy_(0, states[part], ring)
        visible = (now + 1) // every
        if selected is None:
            found = step.group_slots(group, page_table).view(group.size, group.length)
            hidden = torch.arange(group.length, device=now.device) >= visible
        else:
            wanted = selected[0, part].long()
            hidden = (wanted < 0) | (wanted >= visible)
            found = step.slots_at(torch.minimum(wanted, visible - 1).clamp_(min=0), rows[part], page_table)
        distant = pool.index_select(0, found.flatten()).view(*found.shape, entry.shape[2])
        hidden = torch.cat([torch.arange(window, device=now.device) > now, hidden], 1)[:, None]
        # what nobody wrote may be NaN, and a weight of zero would not make that nothing
        keys = torch.cat([ring, distant], 1).to(dtype).masked_fill_(hidden.transpose(1, 2), 0)
        scores = torch.bmm(query[0, part].to(dtype).mul(scale), keys.transpose(1, 2)).masked_fill_(hidden, -torch.inf)
        out[0, part] = torch.bmm(softmax_with_sinks(scores, sinks), keys)

    def prefill(chunk: Prefill) -> None:
        new, context, slot = slice(chunk.token, chunk.token + chunk.size), chunk.context, states[chunk.row : chunk.row + 1]
        ring = recent.index_select(0, slot)[0]  # [window, D]
        kept = torch.arange(max(0, context - window + 1), context, device=ring.device)
        keys = torch.cat([ring.index_select(0, kept % window), key[0, new]]).to(dtype)
        before = pool.index_select(0, step.context_slots(chunk, page_table))
        entries = torch.cat([before, entry[0, step.completed(chunk)]]).to(dtype)
        places = torch.arange(context - len(kept), context + chunk.size, device=ring.device)  # of the keys
        blocks = torch.arange(len(entries), device=ring.device)
        size = max(16, BLOCK_SCORES // (query.shape[2] * (len(entries) + window)))
        for start in range(0, chunk.size, size):
            stop = min(start + size, chunk.size)
            part = slice(chunk.token + start, chunk.token + stop)
            seen = slice(max(0, len(kept) + start - window + 1), len(kept) + stop)
            now = places[len(kept) + start : len(kept) + stop, None]
            near = (places[seen] > now) | (places[seen] <= now - window)
            far = blocks >= (now + 1) // every
            if selected is not None:
                far |= ~chosen_keys(selected[:, part].long(), len(entries))[0]
            both = torch.cat([keys[seen], entries])
            scores = (query[0, part].to(dtype).mul(scale) @ both.t()).masked_fill_(torch.cat([near, far], 1)[:, None], -torch.inf)
            out[0, part] = softmax_with_sinks(scores, sinks) @ both
        last = places[-window:]
        recent.index_copy_(0, slot, ring.index_copy_(0, last % window, keys[-len(last) :].to(ring.dtype))[None])

    for group in step.groups:
        decode(group)
    for chunk in step.prefills:
        prefill(chunk)
    out[0, step.tokens :].zero_()
    return out


def _fake(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape)


compressed_torch = define_op(SCHEMA, _compressed, _fake)


class TorchCompressed(Kernel):
    """The last keys lie in a ring a sequence, which a decode reads as it is."""

    name = "attention.compressed.torch"
    target = "ad_attention::compressed"
    op = "ad_attention::compressed_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return row_buffers(limits, call["every"])

    def group_key(self, call: OpCall) -> Hashable:
        return call["every"]

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_rows(batch, None, out, call["every"])
