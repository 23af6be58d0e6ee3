"""What is the same for every layer of a step: which sequences decode, which prefill, in which slots their states lie.

For kernels over a `SlotState`. `buffers` returns `plan_buffers`, `prepare` calls `plan_step` once a step on the host, and the cached op,
whose arguments are named like the buffers, calls `read_plan` in every layer.
"""

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


class Step(NamedTuple):
    """The buffer `plan`. Decodes, one token each, are the first sequences and the first tokens."""

    tokens: int
    """Rows from here on are padding."""
    decodes: int
    prefills: int
    any_fresh: int
    """Whether a sequence starts with a decode."""
    first_slot: int
    """The decodes' slots are consecutive from it on; NONE if they are not."""


class Chunk(NamedTuple):
    """A row of `records`: tokens `token` to `token + size` of the sequence in `slot`, whose state starts at zero if `fresh`."""

    token: int
    size: int
    slot: int
    fresh: int


def plan_buffers(limits: Limits, host_only: bool = False) -> dict[str, BufferSpec]:
    """The buffers that `plan_step` fills.

    On the host: `plan`, a `Step`, and `records` [sequences, 4], the `Chunk`s of the decodes and then those of the prefills. On the device,
    unless `host_only`, for the decodes alone: `slots` [sequences], and `stale` [sequences], False where a sequence starts.
    """
    count = limits.max_sequences
    host = {
        "plan": BufferSpec((len(Step._fields),), torch.int64, "host"),
        "records": BufferSpec((count, len(Chunk._fields)), torch.int64, "host"),
    }
    return host if host_only else {**host, "slots": BufferSpec((count,), torch.int64), "stale": BufferSpec((count,), torch.bool)}


def plan_step(batch: BatchView, out: Mapping[str, torch.Tensor]) -> None:
    """Fills the buffers of `plan_buffers` for one step, in place; of `slots` and `stale` the decodes' part, if they are there."""
    bounds, slots, fresh = batch.host("cu_seqlens").numpy(), batch.host("state_slots"), batch.host("fresh")
    decodes, sequences = batch.num_decodes, batch.num_sequences
    rows = out["records"].numpy()[:sequences]
    rows[:, 0] = bounds[:-1]
    rows[:, 1] = bounds[1:] - bounds[:-1]
    rows[:, 2] = slots.numpy()
    rows[:, 3] = fresh.numpy()
    own = rows[:decodes, 2].tolist()
    first = own[0] if decodes and own == list(range(own[0], own[0] + decodes)) else NONE
    any_fresh = 1 in rows[:decodes, 3].tolist()
    out["plan"].numpy()[:] = (batch.num_tokens, decodes, sequences - decodes, any_fresh, first)
    if "slots" in out and first == NONE:
        out["slots"][:decodes].copy_(slots[:decodes], non_blocking=True)
    if "stale" in out and any_fresh:
        out["stale"][:decodes].copy_(~fresh[:decodes], non_blocking=True)


def read_plan(plan: torch.Tensor, records: torch.Tensor) -> tuple[Step, list[Chunk]]:
    """The step and its prefills, from the buffers."""
    step = Step(*plan.tolist())
    return step, [Chunk(*row) for row in records[step.decodes : step.decodes + step.prefills].tolist()] if step.prefills else []


def decoding_states(
    pool: torch.Tensor, step: Step, records: torch.Tensor, slots: torch.Tensor, stale: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The decodes' rows with their states [n, ...], to be changed in place: all of them at once, or one by one if they are large. Zero
    where a sequence starts. What was changed is in the pool once the next ones are asked for."""
    if step.decodes > 1 and pool[0].nbytes >= LARGE:
        for row, (_, _, slot, fresh) in enumerate(records[: step.decodes].tolist()):
            if fresh:
                pool[slot].zero_()
            yield slice(row, row + 1), pool[slot : slot + 1]
    elif step.decodes:
        chosen = take_states(pool, step, slots, stale)
        yield slice(0, step.decodes), chosen
        put_states(pool, chosen, step, slots)


def take_states(pool: torch.Tensor, step: Step, slots: torch.Tensor, stale: torch.Tensor) -> torch.Tensor:
    """The decodes' states [n, ...], zero where a sequence starts: a part of the pool itself where they lie side by side in it, else a
    copy that `put_states` brings back."""
    count = step.decodes
    together = step.first_slot != NONE
    chosen = pool[step.first_slot : step.first_slot + count] if together else pool.index_select(0, slots[:count])
    if step.any_fresh:
        chosen.masked_fill_(~stale[:count].view(-1, *[1] * (pool.dim() - 1)), 0)
    return chosen


def put_states(pool: torch.Tensor, chosen: torch.Tensor, step: Step, slots: torch.Tensor, after: torch.Tensor | None = None) -> None:
    """Writes back what `take_states` gave, after it was changed in place; or `after` [n, ...] instead, which is new."""
    if step.first_slot == NONE:
        pool.index_copy_(0, slots[: step.decodes], chosen if after is None else after)
    elif after is not None:
        chosen.copy_(after)
