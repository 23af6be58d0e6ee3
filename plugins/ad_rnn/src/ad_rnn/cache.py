"""What recurrences by channel keep: some numbers a channel."""

from __future__ import annotations

import torch

from ad_core.api import OpCall, SlotState


def rg_lru_state(call: OpCall) -> dict[str, SlotState]:
    """`state` [D], in float32 (float64 for a float64 model)."""
    x = call["x"]
    return {"state": SlotState((int(x.shape[2]),), torch.promote_types(x.dtype, torch.float32))}


def wkv4_state(call: OpCall) -> dict[str, SlotState]:
    """`state` [3, D]: sum of values, sum of weights, and the exponent that both are relative to; in float32 likewise."""
    value = call["value"]
    return {"state": SlotState((3, int(value.shape[2])), torch.promote_types(value.dtype, torch.float32))}


def token_shift_state(call: OpCall) -> dict[str, SlotState]:
    """`state` [D]: the last token as it was."""
    x = call["x"]
    return {"state": SlotState((int(x.shape[2]),), x.dtype)}
