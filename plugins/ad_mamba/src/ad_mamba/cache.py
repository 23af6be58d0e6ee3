"""What the recurrences keep: one state a sequence, in float32 at least."""

from __future__ import annotations

from ad_core.api import OpCall, SlotState
from ad_mamba.op.common import wide


def ssd_state(call: OpCall) -> dict[str, SlotState]:
    """`ssm_state` [H, P, N]."""
    x, B = call["x"], call["B"]
    return {"ssm_state": SlotState((int(x.shape[2]), int(x.shape[3]), int(B.shape[3])), wide(x.dtype))}


def scan_state(call: OpCall) -> dict[str, SlotState]:
    """`ssm_state` [D, N]."""
    channels, size = (int(extent) for extent in call["A"].shape)
    return {"ssm_state": SlotState((channels, size), wide(call["u"].dtype))}
