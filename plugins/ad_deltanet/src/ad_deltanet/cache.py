"""What a delta rule keeps: one matrix a head."""

from __future__ import annotations

import torch

from ad_core.api import OpCall, SlotState


def state_resource(call: OpCall) -> dict[str, SlotState]:
    """`state` [Hv, K, V], in float32 (float64 for a float64 model): it collects what thousands of tokens write."""
    heads, width = (int(extent) for extent in call["value"].shape[2:])
    dtype = torch.promote_types(call["value"].dtype, torch.float32)
    return {"state": SlotState((heads, int(call["key"].shape[3]), width), dtype)}
