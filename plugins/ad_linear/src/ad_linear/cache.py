"""What linear attention keeps: one matrix a head, and the stabiliser of exponential gates."""

from __future__ import annotations

import torch

from ad_core.api import OpCall, SlotState


def lightning_state(call: OpCall) -> dict[str, SlotState]:
    """`state` [H, K, V], in float32 (float64 for a float64 model): it collects what thousands of tokens write."""
    heads, width = (int(extent) for extent in call["value"].shape[2:])
    return {"state": SlotState((heads, int(call["key"].shape[3]), width), _dtype(call))}


def mlstm_state(call: OpCall) -> dict[str, SlotState]:
    """`memory` [H, K, V + 1], whose last column is the normaliser, and `peak` [H]. Zero is where both start."""
    heads, width = (int(extent) for extent in call["value"].shape[2:])
    dtype = _dtype(call)
    return {"memory": SlotState((heads, int(call["key"].shape[3]), width + 1), dtype), "peak": SlotState((heads,), dtype)}


def _dtype(call: OpCall) -> torch.dtype:
    return torch.promote_types(call["value"].dtype, torch.float32)
