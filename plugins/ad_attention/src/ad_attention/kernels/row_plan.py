"""One step as rows of a pool, worked out once for all layers on the host: for kernels whose pools hold one row a token.

Sequences that decode are cut into groups that are computed together, padded on the right to the longest of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ad_core.api import BatchView, BufferSpec, Limits

MAX_ENTRIES = 1 << 20
"""Size of `index`. Groups that do not fit work out their rows in every layer."""
GROUP_ROWS = 1 << 15
"""Rows that a group gathers, padding included: what is gathered should still be in a cache when it is multiplied."""
NONE = -1


class Step(NamedTuple):
    """The buffer `plan`."""

    tokens: int
    decodes: int
    groups: int
    prefills: int


class Group(NamedTuple):
    """A row of `records`: decodes `start` to `start + size` read at most `length` rows each, from their first visible one on. Their slots
    [size, length] begin at `stored` of the index (NONE: they are not stored). `masked`: some have fewer."""

    start: int
    size: int
    length: int
    stored: int
    masked: int


class Prefill(NamedTuple):
    """A row of `records`, after the groups: `size` tokens from `token` on, of batch row `row`, after `context` cached ones, of which those
    from `first` on are visible."""

    row: int
    token: int
    size: int
    context: int
    first: int


WIDTH = max(len(Group._fields), len(Prefill._fields))


def row_buffers(limits: Limits) -> dict[str, BufferSpec]:
    """The buffers that `plan_rows` fills."""
    entries = max(min(limits.max_sequences * limits.max_model_len, MAX_ENTRIES), limits.max_model_len)
    return {
        "plan": BufferSpec((len(Step._fields),), torch.int64, "host"),
        "records": BufferSpec((2 * limits.max_sequences, WIDTH), torch.int64, "host"),
        "slots": BufferSpec((limits.max_tokens,), torch.int64),
        "rows": BufferSpec((limits.max_tokens,), torch.int64),
        "bounds": BufferSpec((2, limits.max_sequences), torch.int64),
        "index": BufferSpec((entries,), torch.int64),
    }


def plan_rows(batch: BatchView, window: int | None, out: Mapping[str, torch.Tensor]) -> None:
    """Fills the buffers in place: `slots` [T] is where each token's row goes, `rows` [T] its batch row, `bounds` the first visible
    position of each decode and how many rows it sees, its own among them."""
    table, contexts = batch.host("page_table").numpy(), batch.host("context_lens").numpy().astype(np.int64)
    cu_seqlens, slots = batch.host("cu_seqlens").numpy(), batch.host("token_slots")
    out["slots"][: len(slots)].copy_(slots)
    owners = np.repeat(np.arange(len(contexts)), np.diff(cu_seqlens)[: len(contexts)])
    out["rows"][: len(owners)].copy_(torch.from_numpy(owners))
    decodes = batch.num_decodes
    positions = contexts[:decodes]
    first = positions * 0 if window is None else np.maximum(positions - window + 1, 0)
    lengths = positions - first + 1
    if decodes:
        out["bounds"][:, :decodes].copy_(torch.from_numpy(np.stack([first, lengths])))
    groups, used = [], 0
    for start, stop in _groups(lengths):
        longest = int(lengths[start:stop].max())
        entries = (stop - start) * longest
        at = NONE
        if used + entries <= out["index"].shape[0]:
            at, used = used, used + entries
            wanted = np.minimum(first[start:stop, None] + np.arange(longest), positions[start:stop, None])
            rows = table[np.arange(start, stop)[:, None], wanted // batch.page_size].astype(np.int64)
            found = rows * batch.page_size + wanted % batch.page_size
            out["index"][at:used].copy_(torch.from_numpy(found.reshape(-1)))
        groups.append(Group(start, stop - start, longest, at, int(int(lengths[start:stop].min()) < longest)))
    prefills = []
    for row in range(decodes, batch.num_sequences):
        token, context = int(cu_seqlens[row]), int(contexts[row])
        size = int(cu_seqlens[row + 1]) - token
        if size:
            prefills.append(Prefill(row, token, size, context, 0 if window is None else max(0, context - window + 1)))
    out["plan"].numpy()[:] = Step(batch.num_tokens, decodes, len(groups), len(prefills))
    records = out["records"].numpy()
    for place, record in enumerate((*groups, *prefills)):
        records[place, : len(record)] = record


def _groups(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Neighbours that together stay below `GROUP_ROWS`, at least one each."""
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if place > start and longest * (place - start + 1) > GROUP_ROWS:
            cuts.append((start, place))
            start, longest = place, length
    return [*cuts, (start, len(lengths))] if len(lengths) else []


class RowPlan:
    """The buffers as a cached op reads them."""

    def __init__(self, plan: torch.Tensor, records: torch.Tensor, slots: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor):
        self.tokens, self.decodes, groups, prefills = plan.tolist()
        listed = records[: groups + prefills].tolist()
        self.groups = [Group(*record) for record in listed[:groups]]
        self.prefills = [Prefill(*record) for record in listed[groups:]]
        self.slots, self.bounds, self._index = slots[: self.tokens], bounds, index

    def write(self, pool: torch.Tensor, entries: torch.Tensor) -> None:
        """The step's entries [T, ...] go to their rows of a pool [pages, page_size, ...]."""
        pool.flatten(0, 1).index_copy_(0, self.slots, entries[: self.tokens])

    def group_slots(self, group: Group, page_table: torch.Tensor, page_size: int) -> torch.Tensor:
        """[size * length]: the rows that a group reads, one sequence after the other. Those past a sequence's own repeat its last."""
        if group.stored != NONE:
            return self._index[group.stored : group.stored + group.size * group.length]
        first, count = self.bounds[:, group.start : group.start + group.size, None]
        steps = torch.arange(group.length, device=first.device)
        wanted = first + torch.minimum(steps, count - 1)
        pages = page_table[group.start : group.start + group.size].gather(1, wanted // page_size).long()
        return (pages * page_size + wanted % page_size).flatten()

    def hidden(self, group: Group) -> torch.Tensor | None:
        """[size, length] bool: True where a row is padding; None if none is."""
        if not group.masked:
            return None
        count = self.bounds[1, group.start : group.start + group.size, None]
        return torch.arange(group.length, device=count.device) >= count

    @staticmethod
    def slots_at(wanted: torch.Tensor, rows: torch.Tensor, page_table: torch.Tensor, page_size: int) -> torch.Tensor:
        """[n, K]: the rows at positions [n, K] of batch rows [n]."""
        pages = page_table.index_select(0, rows).gather(1, wanted // page_size).long()
        return pages * page_size + wanted % page_size

    @staticmethod
    def context_slots(part: Prefill, page_table: torch.Tensor, page_size: int) -> torch.Tensor:
        """[context - first]: the rows of a chunk's visible past."""
        wanted = torch.arange(part.first, part.context, device=page_table.device)
        return page_table[part.row].index_select(0, wanted // page_size).long() * page_size + wanted % page_size
