"""Two complete mixers, as small as they can be: one for each physical kind of memory. To read, to copy, and to test rooms on.

`Ema` keeps a state of fixed size; `Recall` keeps an entry a token in pages. Their kernels are loops: right, and slow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, Mixer, OpCall, PagedTokens, Resource, Role, SlotState
from ad_core.graph.ops import define_op
from ad_core.testing.cases import Case

# -- a recurrence: y_t = decay * y_{t-1} + (1 - decay) * x_t ----------------------------------------------------------


def ema_reference(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """x [B, S, C], decay [C] -> [B, S, C]. Half precision keeps its state in float32."""
    return _ema_scan(x, decay, torch.zeros_like(x[:, 0], dtype=_state_dtype(x)))[0]


def _state_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _ema_scan(x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scan gives the canonical op and the cached one: state [B, C] in, state after the last token out."""
    outputs, weight = x.new_empty(x.shape), decay.to(state.dtype)
    for t in range(x.shape[1]):
        state = weight * state + (1 - weight) * x[:, t].to(state.dtype)
        outputs[:, t] = state
    return outputs, state


def ema_slots(
    x: torch.Tensor, decay: torch.Tensor, state: torch.Tensor, cu_seqlens: torch.Tensor, state_slots: torch.Tensor, fresh: torch.Tensor
) -> torch.Tensor:
    """x [1, T, C]; reads and writes `state` [slots, C] at `state_slots`; a `fresh` sequence starts at zero."""
    out, bounds = torch.zeros_like(x), cu_seqlens.tolist()
    for row, slot in enumerate(state_slots.tolist()):
        tokens = slice(bounds[row], bounds[row + 1])
        if tokens.start == tokens.stop:
            continue
        before = torch.zeros_like(state[slot]) if fresh[row] else state[slot]
        out[:, tokens], after = _ema_scan(x[:, tokens], decay, before[None])
        state[slot] = after[0]
    return out


ema = define_op("toy::ema(Tensor x, Tensor decay) -> Tensor", ema_reference, lambda x, decay: x.new_empty(x.shape))
define_op(
    "toy::ema_slots(Tensor x, Tensor decay, Tensor(a!) state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor",
    ema_slots,
    lambda x, *_: torch.empty_like(x),
)


class EmaSlots(Kernel):
    """Loops over sequences and tokens."""

    name = "toy.ema.slots"
    target = "toy::ema"
    op = "toy::ema_slots"


class Ema(Mixer):
    """An exponential moving average a channel."""

    name = "toy.ema"
    op = ema
    roles = {"x": Role.TOKEN, "decay": Role.PARAM}
    kernels = (EmaSlots(),)

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return {"state": SlotState((int(call["x"].shape[2]),), _state_dtype(call["x"]))}


def _ema_case(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(batch, length, 6, generator=generator)
    return {"x": x.to(dtype), "decay": torch.rand(6, generator=generator).to(dtype)}


EMA_CASES = [Case("plain", _ema_case)]

# -- attention of tokens to tokens: y_i = sum_j softmax_j(x_i . x_j) x_j over the visible j <= i ------------------------


def recall_reference(x: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """x [B, S, C] -> [B, S, C]."""
    length = torch.arange(x.shape[1], device=x.device)
    return _recall(x, x, length, length, window)


def _recall(query: torch.Tensor, entries: torch.Tensor, i: torch.Tensor, j: torch.Tensor, window: int | None) -> torch.Tensor:
    """query [..., m, C] at positions i, entries [..., n, C] at positions j."""
    distance = i[:, None] - j
    blocked = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ entries.to(wide).transpose(-1, -2)
    return (scores.masked_fill(blocked, -torch.inf).softmax(-1) @ entries.to(wide)).to(query.dtype)


def recall_paged(
    x: torch.Tensor,
    window: int | None,
    append: bool,
    entries: torch.Tensor,
    token_slots: torch.Tensor,
    page_table: torch.Tensor,
    bounds: torch.Tensor,
) -> torch.Tensor:
    """x [1, T, C]; appends it to `entries` [pages, page_size, C]. `bounds` [B + 1, 3] holds first token, tokens and context
    of each sequence, on the host, and ends at a row of zero tokens."""
    out, page_size = torch.zeros_like(x), entries.shape[1]
    flat = entries.flatten(0, 1)
    for row, (first, count, context) in enumerate(bounds.tolist()):
        if not count:
            break
        tokens = slice(first, first + count)
        if append:
            flat[token_slots[tokens]] = x[0, tokens]
        oldest = 0 if window is None else max(0, context - window + 1)
        positions = torch.arange(oldest, context + count, device=x.device)
        kept = flat[page_table[row, positions // page_size] * page_size + positions % page_size]
        out[0, tokens] = _recall(x[0, tokens], kept, positions[context - oldest :], positions, window)
    return out


recall = define_op("toy::recall(Tensor x, int? window=None) -> Tensor", recall_reference, lambda x, window=None: x.new_empty(x.shape))
RECALL_PAGED = "(Tensor x, int? window, bool append, Tensor(a!) entries, Tensor token_slots, Tensor page_table, Tensor bounds) -> Tensor"
define_op(f"toy::recall_paged{RECALL_PAGED}", recall_paged, lambda x, *_: torch.empty_like(x))


class RecallPaged(Kernel):
    """Loops over sequences; where they begin and end it reads from a buffer of its own."""

    name = "toy.recall.paged"
    target = "toy::recall"
    op = "toy::recall_paged"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return {"bounds": BufferSpec((limits.max_sequences + 1, 3), torch.int64, "host")}

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        rows = [batch.host(name) for name in ("cu_seqlens", "query_lens", "context_lens")]
        out["bounds"][: batch.num_sequences] = torch.stack([rows[0][:-1], *rows[1:]], 1)
        out["bounds"][batch.num_sequences] = 0


class Recall(Mixer):
    """Tokens that look at what earlier tokens were."""

    name = "toy.recall"
    op = recall
    roles = {"x": Role.TOKEN, "window": Role.CONST}
    kernels = (RecallPaged(),)

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return {"entries": PagedTokens((int(call["x"].shape[2]),), call["x"].dtype, call["window"])}

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        return ("x", "window")


def _recall_case(window: int | None) -> Case:
    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.randn(batch, length, 6, generator=generator).to(dtype), "window": window}

    return Case("all" if window is None else f"window_{window}", make)


RECALL_CASES = [_recall_case(None), _recall_case(5)]
