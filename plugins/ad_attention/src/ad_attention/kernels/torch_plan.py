"""What one step means for the torch kernel, worked out once for all layers, on the host.

Sequences that decode are cut into groups that are computed together. A group of n sequences with at most L visible keys sees
them right-aligned: column c of every row is the key at distance L - 1 - c, so a bias by distance is the same for all rows.
Columns to the left of a row's first visible key read that key once more and are masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from ad_core.api import BatchView, BufferSpec, Limits

MAX_ENTRIES = 1 << 20
"""Size of `index` and `mask`. Groups that do not fit compute theirs in every layer: by then that is a tenth of the time."""
GROUP_BYTES = 4 << 20
"""Keys and values that a group gathers: what is gathered should still be in a cache when it is multiplied."""
SMALL_ELEMENTS = 200_000
"""Gathered key elements below which set-up counts most: half precision is then not worth two batched products of its own."""
SMALL_VIEW = 64_000
"""The same for keys that are read where they lie: converting them is then the only copy."""
BAGS_SHARED_BY = 4
"""Up to so many query heads a key/value head, values are summed where they lie; with more, each would be read too often."""
FUSED, EXACT, SPLIT, BAGGED = range(4)
"""How a decode group is computed, see `torch_math`."""
NONE = -1


class Step(NamedTuple):
    """The buffer `plan`: what every step has. The last five are the first decode group, so that most steps read no more."""

    tokens: int
    decodes: int
    groups: int
    prefills: int
    write_start: int
    permuted: int
    size: int
    length: int
    index_start: int
    view_start: int
    masked: int
    mode: int


class Group(NamedTuple):
    """A row of `records`: `size` decodes of at most `length` keys, whose gather index starts at `index_start` of `index` (NONE:
    not stored). `view_start` is the slot of the first key if the keys lie in consecutive slots, else NONE."""

    size: int
    length: int
    index_start: int
    view_start: int
    masked: int
    mode: int


class Prefill(NamedTuple):
    """A row of `records`, after the groups: `size` tokens from `token` on, of batch row `row`, after `context` cached ones, of
    which those from `first` on are visible."""

    row: int
    token: int
    size: int
    context: int
    first: int
    index_start: int
    view_start: int


RECORD = max(len(Group._fields), len(Prefill._fields))


@dataclass(frozen=True)
class Shape:
    """What the plan must know of a call: H, G, D and Dv, visibility, and whether one fused call can compute it."""

    query_heads: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None
    chunk: int | None
    fusable: bool
    on_cpu: bool

    def mode(self, elements: int, viewed: bool) -> int:
        """How to compute a decode group of so many key elements, gathered or `viewed` in place."""
        if not self.on_cpu or self.dtype not in (torch.bfloat16, torch.float16):
            return EXACT
        # With one query a head the fused kernel falls back to a slow product.
        fused = self.fusable and self.query_heads > self.heads
        if viewed:
            return FUSED if fused and elements < SMALL_VIEW else EXACT
        if elements >= SMALL_ELEMENTS and self.dtype == torch.bfloat16 and _bfloat16_products_are_fast():
            return BAGGED if self.query_heads <= BAGS_SHARED_BY * self.heads else SPLIT
        return FUSED if fused else EXACT


@cache
def _bfloat16_products_are_fast() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def plan_buffers(heads: int, limits: Limits) -> dict[str, BufferSpec]:
    """The buffers that `plan_step` fills."""
    entries = min(limits.max_sequences * limits.max_model_len * heads, MAX_ENTRIES)
    return {
        "plan": BufferSpec((len(Step._fields),), torch.int64, "host"),
        "records": BufferSpec((2 * limits.max_sequences, RECORD), torch.int64, "host"),
        "rows": BufferSpec((3, limits.max_sequences), torch.int64),
        "slots": BufferSpec((limits.max_tokens,), torch.int64),
        "index": BufferSpec((entries,), torch.int32),
        "mask": BufferSpec((entries,), torch.float32),
    }


def plan_step(batch: BatchView, shape: Shape, out: Mapping[str, torch.Tensor]) -> None:
    """Fills the buffers of `plan_buffers` in place: `rows` holds batch row, position and first visible position of the decodes in
    the order in which the groups take them, `slots` where each token is written."""
    table, contexts, slots = (batch.host(name).numpy() for name in ("page_table", "context_lens", "token_slots"))
    gather = Gather(out["index"], batch.page_size, shape.heads, out["mask"])
    _fill(out["slots"], slots)

    decodes = batch.num_decodes
    positions = contexts[:decodes].astype(np.int64)
    first = _first_visible(positions, shape)
    lengths = positions - first + 1
    order, sizes = _decode_groups(lengths, shape)
    permuted = order is not None
    if order is None:
        order = np.arange(decodes)
    rows = np.stack([order, positions[order], first[order]])
    if decodes:
        _fill(out["rows"], rows)
    groups, start = [], 0
    for count in sizes:
        members = rows[:, start : start + count]
        length = int(lengths[order[start : start + count]].max())
        view = NONE if count > 1 else _consecutive(table[members[0, 0]], int(members[2, 0]), length, batch.page_size)
        mode = shape.mode(count * length * shape.heads * shape.head_dim, view != NONE)
        masked = int((members[1] - members[2] + 1).min()) < length
        index_start = NONE if view != NONE else gather.decodes(table, members, length, masked)
        groups.append(Group(count, length, index_start, view, masked, mode))
        start += count

    prefills = plan_chunks(batch, shape, gather)
    write_start = int(slots[0]) if len(slots) and (np.diff(slots) == 1).all() else NONE
    lead = groups[0] if groups else Group(0, 0, NONE, NONE, 0, EXACT)
    step = Step(batch.num_tokens, decodes, len(groups), len(prefills), write_start, permuted, *lead)
    out["plan"].numpy()[:] = step
    records = out["records"].numpy()
    for place, record in enumerate((*groups, *prefills)):
        records[place, : len(record)] = record


def plan_chunks(batch: BatchView, shape: Shape, gather: Gather) -> list[Prefill]:
    """The chunks of prompts in the step, with the places of their visible past."""
    cu_seqlens, table = batch.host("cu_seqlens").numpy(), batch.host("page_table").numpy()
    contexts = batch.host("context_lens").numpy()
    chunks = []
    for row in range(batch.num_decodes, batch.num_sequences):
        token, context = int(cu_seqlens[row]), int(contexts[row])
        count = int(cu_seqlens[row + 1]) - token
        if not count:
            continue
        visible = int(_first_visible(contexts[row : row + 1], shape)[0])
        index_start = view = NONE
        if context > visible:
            view = _consecutive(table[row], visible, context - visible, batch.page_size)
            index_start = NONE if view != NONE else gather.context(table[row], visible, context)
        chunks.append(Prefill(row, token, count, context, visible, index_start, view))
    return chunks


def _first_visible(positions: np.ndarray, shape: Shape) -> np.ndarray:
    first = np.zeros_like(positions)
    if shape.window is not None:
        first = np.maximum(first, positions - shape.window + 1)
    if shape.chunk is not None:
        first = np.maximum(first, positions // shape.chunk * shape.chunk)
    return first


def _decode_groups(lengths: np.ndarray, shape: Shape) -> tuple[np.ndarray | None, list[int]]:
    """An order of the decodes (None: as they are) and the sizes of its groups: rows of one group should not be padded much,
    and a group should fit `GROUP_BYTES`."""
    token_bytes = shape.heads * (shape.head_dim + shape.value_dim) * shape.dtype.itemsize
    if len(lengths) == 0:
        return None, []
    longest = int(lengths.max())
    if len(lengths) * longest <= 1.3 * int(lengths.sum()):
        return None, _split(len(lengths), longest, token_bytes)
    order = np.argsort(lengths, kind="stable")
    sizes, start = [], 0
    limits = lengths[order].tolist()
    for end in range(1, len(limits) + 1):
        if end == len(limits) or limits[end] > 1.3 * limits[start] + 16:
            sizes += _split(end - start, limits[end - 1], token_bytes)
            start = end
    return order, sizes


def _split(count: int, length: int, token_bytes: int) -> list[int]:
    """`count` rows in parts of about equal size that fit `GROUP_BYTES`, at least one row each."""
    parts = -(-count // max(1, GROUP_BYTES // (length * token_bytes)))
    return [count * (part + 1) // parts - count * part // parts for part in range(parts)]


def _consecutive(pages: np.ndarray, first: int, length: int, page_size: int) -> int:
    """The slot of position `first` if the slots of the `length` positions from there on are consecutive, else NONE."""
    used = pages[first // page_size : (first + length - 1) // page_size + 1]
    if (np.diff(used) != 1).any():
        return NONE
    return int(used[0]) * page_size + first % page_size


class Gather:
    """Writes gather indices one after the other: rows of a pool seen as [slots * G, D], laid out [n, G, L]."""

    def __init__(self, index: torch.Tensor, page_size: int, heads: int, mask: torch.Tensor | None = None):
        self.index, self.mask, self.page_size, self.heads = index, mask, page_size, heads
        self.used = 0

    def decodes(self, table: np.ndarray, members: np.ndarray, length: int, masked: bool) -> int:
        """The keys of a decode group, right-aligned, with its mask [n, L] at the same place of `mask`."""
        if (start := self._claim(members.shape[1] * length)) == NONE:
            return NONE
        rows, positions, first = members[:, :, None]
        wanted = positions + np.arange(1 - length, 1)
        slots = self._slots(table[rows, np.maximum(wanted, first) // self.page_size], np.maximum(wanted, first))
        self._store(start, slots)
        if masked:
            assert self.mask is not None
            _fill(self.mask[start:], np.where(wanted < first, np.float32(-np.inf), np.float32(0)))
        return start

    def context(self, pages: np.ndarray, first: int, stop: int) -> int:
        """The cached keys `first` to `stop` of one sequence."""
        if (start := self._claim(stop - first)) == NONE:
            return NONE
        wanted = np.arange(first, stop)
        self._store(start, self._slots(pages[wanted // self.page_size], wanted)[None])
        return start

    def _claim(self, tokens: int) -> int:
        start, self.used = self.used, self.used + tokens * self.heads
        return start if self.used <= self.index.shape[0] else NONE

    def _slots(self, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return (pages * self.page_size + positions % self.page_size).astype(np.int32)

    def _store(self, start: int, slots: np.ndarray) -> None:
        """`slots` [n, L]."""
        _fill(self.index[start:], slots[:, None] * self.heads + np.arange(self.heads, dtype=np.int32)[:, None])


def _fill(target: torch.Tensor, values: np.ndarray) -> None:
    """Copies `values` to the front of `target`: row by row if it has two dimensions, else flattened."""
    if target.dim() == 1:
        target, values = target[: values.size], values.reshape(-1)
    else:
        target = target[:, : values.shape[1]]
    if target.is_cpu:
        target.numpy()[...] = values
    else:
        target.copy_(torch.from_numpy(np.ascontiguousarray(values)))
