"""One step as rows of a pool, worked out once for all layers on the host: for kernels whose pools hold one row a token, or one for every so
many tokens.

Entry w of a sequence is the row of its tokens w * every to (w + 1) * every - 1, and is there once the last of them is. Sequences that
decode are cut into groups that are computed together, padded on the right to the longest of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ad_core.api import BatchView, BufferSpec, Limits

MAX_ENTRIES = 1 << 20
"""Size of `index`. Groups that do not fit work out their rows in every layer."""
GROUP_ROWS = 1 << 15
"""Rows that a group gathers, padding included: what is gathered should still be in a cache when it is multiplied."""
NONE = -1


class Place(NamedTuple):
    """Where entries lie in a pool: numbers are ints, arrays or tensors alike."""

    page_size: int
    every: int

    def block(self, entry: Any) -> Any:
        """Which of its sequence's pages has the entry."""
        return ((entry + 1) * self.every - 1) // self.page_size

    def row(self, page: Any, entry: Any) -> Any:
        """The entry's row of the pool, which lies in `page`."""
        return self.row_at(page, ((entry + 1) * self.every - 1) % self.page_size)

    def row_at(self, page: Any, offset: Any) -> Any:
        """The row of the entry whose last token lies at `offset` of `page`."""
        return page * -(-self.page_size // self.every) + offset // self.every


class Step(NamedTuple):
    """The buffer `plan`. `entries`: so many are complete with this step."""

    tokens: int
    decodes: int
    groups: int
    prefills: int
    entries: int
    page_size: int
    every: int


class Group(NamedTuple):
    """A row of `records`: decodes `start` to `start + size` read at most `length` rows each, from their first visible one on. Their slots
    [size, length] begin at `stored` of the index (NONE: they are not stored). `masked`: some have fewer, or none."""

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


def row_buffers(limits: Limits, every: int = 1) -> dict[str, BufferSpec]:
    """The buffers that `plan_rows` fills; `ends` only where an entry is of more than one token."""
    longest = limits.max_model_len // every
    entries = max(min(limits.max_sequences * longest, MAX_ENTRIES), longest)
    ends = {"ends": BufferSpec((limits.max_tokens,), torch.int64)} if every > 1 else {}
    return ends | {
        "plan": BufferSpec((len(Step._fields),), torch.int64, "host"),
        "records": BufferSpec((2 * limits.max_sequences, WIDTH), torch.int64, "host"),
        "slots": BufferSpec((limits.max_tokens,), torch.int64),
        "rows": BufferSpec((limits.max_tokens,), torch.int64),
        "bounds": BufferSpec((2, limits.max_sequences), torch.int64),
        "index": BufferSpec((entries,), torch.int64),
    }


def plan_rows(batch: BatchView, window: int | None, out: Mapping[str, torch.Tensor], every: int = 1) -> None:
    """Fills the buffers in place: `slots` is where each of the step's entries goes, `ends` the token that completes it, `rows` [T] each
    token's batch row, `bounds` the first visible entry of each decode and how many it sees. A `window` needs `every` to be 1."""
    table, contexts = batch.host("page_table").numpy(), batch.host("context_lens").numpy().astype(np.int64)
    cu_seqlens, slots = batch.host("cu_seqlens").numpy(), batch.host("token_slots")
    place = Place(batch.page_size, every)
    if every > 1:
        ends = torch.nonzero((batch.host("positions") + 1) % every == 0)[:, 0]
        out["ends"][: len(ends)].copy_(ends)
        slots = slots[ends]
        slots = place.row_at(slots // place.page_size, slots % place.page_size)
    out["slots"][: len(slots)].copy_(slots)
    owners = np.repeat(np.arange(len(contexts)), np.diff(cu_seqlens)[: len(contexts)])
    out["rows"][: len(owners)].copy_(torch.from_numpy(owners))
    decodes = batch.num_decodes
    positions = contexts[:decodes]
    first = positions * 0 if window is None else np.maximum(positions - window + 1, 0)
    lengths = (positions + 1) // every - first
    if decodes:
        out["bounds"][:, :decodes].copy_(torch.from_numpy(np.stack([first, lengths])))
    groups, used = [], 0
    for start, stop in _groups(lengths):
        longest = int(lengths[start:stop].max())
        entries = (stop - start) * longest
        at = NONE
        if used + entries <= out["index"].shape[0]:
            at, used = used, used + entries
            last = np.maximum(first + lengths - 1, 0)[start:stop, None]
            wanted = np.minimum(first[start:stop, None] + np.arange(longest), last)
            pages = table[np.arange(start, stop)[:, None], place.block(wanted)].astype(np.int64)
            out["index"][at:used].copy_(torch.from_numpy(place.row(pages, wanted).reshape(-1)))
        groups.append(Group(start, stop - start, longest, at, int(int(lengths[start:stop].min()) < longest)))
    prefills = []
    for row in range(decodes, batch.num_sequences):
        token, context = int(cu_seqlens[row]), int(contexts[row])
        size = int(cu_seqlens[row + 1]) - token
        if size:
            prefills.append(Prefill(row, token, size, context, 0 if window is None else max(0, context - window + 1)))
    out["plan"].numpy()[:] = Step(batch.num_tokens, decodes, len(groups), len(prefills), len(slots), *place)
    records = out["records"].numpy()
    for number, record in enumerate((*groups, *prefills)):
        records[number, : len(record)] = record


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

    def __init__(
        self,
        plan: torch.Tensor,
        records: torch.Tensor,
        slots: torch.Tensor,
        bounds: torch.Tensor,
        index: torch.Tensor,
        ends: torch.Tensor | None = None,
    ):
        step = Step(*plan.tolist())
        listed = records[: step.groups + step.prefills].tolist()
        self.tokens, self.decodes, self._place = step.tokens, step.decodes, Place(step.page_size, step.every)
        self.groups = [Group(*record) for record in listed[: step.groups]]
        self.prefills = [Prefill(*record) for record in listed[step.groups :]]
        self.slots, self.bounds, self._index = slots[: step.entries], bounds, index
        self._ends = None if ends is None else ends[: step.entries]

    def write(self, pool: torch.Tensor, given: torch.Tensor) -> None:
        """What the step's tokens give [T, ...] goes to the rows of their entries in a pool [pages, entries, ...]."""
        given = given[: self.tokens] if self._ends is None else given.index_select(0, self._ends)
        pool.flatten(0, 1).index_copy_(0, self.slots, given)

    def group_slots(self, group: Group, page_table: torch.Tensor) -> torch.Tensor:
        """[size * length]: the rows that a group reads, one sequence after the other. Those past a sequence's own repeat its last; of one
        that has none they are any rows."""
        if group.stored != NONE:
            return self._index[group.stored : group.stored + group.size * group.length]
        first, count = self.bounds[:, group.start : group.start + group.size, None]
        steps = torch.arange(group.length, device=first.device)
        wanted = first + torch.minimum(steps, (count - 1).clamp_(min=0))
        pages = page_table[group.start : group.start + group.size].gather(1, self._place.block(wanted)).long()
        return self._place.row(pages, wanted).flatten()

    def hidden(self, group: Group) -> torch.Tensor | None:
        """[size, length] bool: True where a row is padding; None if none is."""
        if not group.masked:
            return None
        count = self.bounds[1, group.start : group.start + group.size, None]
        return torch.arange(group.length, device=count.device) >= count

    def slots_at(self, wanted: torch.Tensor, rows: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
        """[n, K]: the rows of entries [n, K] of batch rows [n]."""
        pages = page_table.index_select(0, rows).gather(1, self._place.block(wanted)).long()
        return self._place.row(pages, wanted)

    def context_slots(self, part: Prefill, page_table: torch.Tensor) -> torch.Tensor:
        """The rows of a chunk's visible past: entries `first` to `context` // every."""
        wanted = torch.arange(part.first, part.context // self._place.every, device=page_table.device)
        return self._place.row(page_table[part.row].index_select(0, self._place.block(wanted)).long(), wanted)

    def completed(self, part: Prefill) -> slice:
        """The tokens of a chunk that complete an entry."""
        every = self._place.every
        return slice(part.token + every - 1 - part.context % every, part.token + part.size, every)
