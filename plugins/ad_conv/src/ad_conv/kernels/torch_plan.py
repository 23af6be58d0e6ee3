"""What is the same for all layers of a step, worked out once on the host: which slots the decodes have, which sequences prefill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ad_core.api import BatchView, BufferSpec, Limits

NONE = -1


class Step(NamedTuple):
    """The whole of the buffer `plan`. Decodes, one token each, are the first sequences and the first tokens."""

    tokens: int
    decodes: int
    first_slot: int
    """Slot of the first decode if those of all decodes are consecutive, else NONE."""
    fresh_decodes: int
    prefills: int


class Prefill(NamedTuple):
    """A row of `records`: `size` tokens from `token` on, of the sequence in `slot`, whose state starts at zero if `fresh`.

    Fresh decodes come first, with a size of one; prefills follow them.
    """

    token: int
    size: int
    slot: int
    fresh: int


def plan_buffers(limits: Limits) -> dict[str, BufferSpec]:
    """The buffers that `plan_step` fills."""
    return {
        "plan": BufferSpec((len(Step._fields),), torch.int64, "host"),
        "records": BufferSpec((limits.max_sequences, len(Prefill._fields)), torch.int64, "host"),
        "slots": BufferSpec((limits.max_sequences,), torch.int64),
    }


def plan_step(batch: BatchView, out: Mapping[str, torch.Tensor]) -> None:
    """Fills the buffers of `plan_buffers` in place; `slots` holds the slots of the decodes, if it is there."""
    slots, starts = batch.host("state_slots"), batch.host("cu_seqlens").tolist()
    fresh, decodes = batch.host("fresh").tolist(), batch.num_decodes
    own = slots.tolist()
    consecutive = all(slot == own[0] + place for place, slot in enumerate(own[:decodes]))
    new = [row for row in range(decodes) if fresh[row]]
    chunks = [row for row in range(decodes, batch.num_sequences) if starts[row + 1] > starts[row]]
    step = Step(batch.num_tokens, decodes, own[0] if consecutive and decodes else NONE, len(new), len(chunks))
    out["plan"].copy_(torch.tensor(step))
    rows = [Prefill(starts[row], starts[row + 1] - starts[row], own[row], fresh[row]) for row in (*new, *chunks)]
    if rows:
        out["records"][: len(rows)] = torch.tensor(rows)
    if decodes and "slots" in out:
        out["slots"][:decodes].copy_(slots[:decodes], non_blocking=True)
