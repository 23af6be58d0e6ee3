"""What is the same for every layer of a step, worked out once on the host: which sequences decode, which prefill, in which slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from ad_core.api import BatchView, BufferSpec, Limits

NONE = -1
"""No such slot."""
LARGE = 256 << 10
"""Bytes of a state from which on decodes are moved on one by one where they lie: together they would leave the processor's cache between
two operations, and bringing them together and back would cost more than the operations."""
_FIELDS = 4


class Head(NamedTuple):
    """The plan's first row. `first_slot`: the decodes' slots are consecutive from it on, NONE if they are not."""

    decodes: int
    prefills: int
    any_fresh: int
    first_slot: int


class Prefill(NamedTuple):
    """One sequence with more than one token: rows `token` to `token + size`."""

    token: int
    size: int
    slot: int
    fresh: int


def plan_buffers(limits: Limits) -> dict[str, BufferSpec]:
    """`plan` [sequences + 1, 4] on the host: a `Head`, the `Prefill`s, and the decodes in the same form. `slots` [sequences]: those of
    the decodes. `stale` [sequences]: 0 for a decode whose sequence starts here, 1 for the others."""
    count = limits.max_sequences
    return {
        "plan": BufferSpec((count + 1, _FIELDS), torch.int64, "host"),
        "slots": BufferSpec((count,), torch.int64),
        "stale": BufferSpec((count,), torch.bool),
    }


def plan_step(batch: BatchView, out: Mapping[str, torch.Tensor]) -> None:
    """Fills the buffers for one step."""
    bounds, slots = batch.host("cu_seqlens").tolist(), batch.host("state_slots")
    fresh, decodes = batch.host("fresh"), batch.num_decodes
    places, starting = slots.tolist(), fresh.tolist()
    rows = [Prefill(bounds[row], bounds[row + 1] - bounds[row], places[row], int(starting[row])) for row in range(batch.num_sequences)]
    records = [record for record in rows[decodes:] if record.size]
    first = places[0] if decodes and places[:decodes] == list(range(places[0], places[0] + decodes)) else NONE
    head = Head(decodes, len(records), int(any(starting[:decodes])), first)
    filled = [head, *records, *rows[:decodes]]
    out["plan"][: len(filled)] = torch.tensor(filled, dtype=torch.int64)
    out["slots"][:decodes].copy_(slots[:decodes], non_blocking=True)
    out["stale"][:decodes].copy_(~fresh[:decodes], non_blocking=True)


def read_plan(plan: torch.Tensor) -> tuple[Head, list[Prefill]]:
    """What `plan_step` wrote."""
    head = Head(*plan[0].tolist())
    return head, [Prefill(*record) for record in plan[1 : head.prefills + 1].tolist()] if head.prefills else []


def decoding_states(
    pool: torch.Tensor, plan: torch.Tensor, head: Head, slots: torch.Tensor, stale: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The decodes' rows with their states [n, ...], to be changed in place: all of them at once, or one by one if they are large. Zero
    where a sequence starts. What was changed is in the pool once the next ones are asked for."""
    if head.decodes > 1 and pool[0].nbytes >= LARGE:
        first = head.prefills + 1
        for row, (_, _, slot, fresh) in enumerate(plan[first : first + head.decodes].tolist()):
            if fresh:
                pool[slot].zero_()
            yield slice(row, row + 1), pool[slot : slot + 1]
    elif head.decodes:
        chosen = take_states(pool, head, slots, stale)
        yield slice(0, head.decodes), chosen
        put_states(pool, chosen, head, slots)


def take_states(pool: torch.Tensor, head: Head, slots: torch.Tensor, stale: torch.Tensor) -> torch.Tensor:
    """The decodes' states [n, ...], zero where a sequence starts: a part of the pool itself where they lie side by side in it, else a
    copy that `put_states` brings back."""
    count = head.decodes
    together = head.first_slot != NONE
    chosen = pool[head.first_slot : head.first_slot + count] if together else pool.index_select(0, slots[:count])
    if head.any_fresh:
        chosen.masked_fill_(~stale[:count].view(-1, *[1] * (pool.dim() - 1)), 0)
    return chosen


def put_states(pool: torch.Tensor, chosen: torch.Tensor, head: Head, slots: torch.Tensor) -> None:
    """Writes back what `take_states` gave, after it was changed in place."""
    if head.first_slot == NONE:
        pool.index_copy_(0, slots[: head.decodes], chosen)
