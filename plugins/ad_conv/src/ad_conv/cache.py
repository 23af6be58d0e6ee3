"""What a causal convolution keeps: the inputs that the next tokens still see."""

from __future__ import annotations

from ad_core.api import OpCall, SlotState


def conv_state(call: OpCall) -> dict[str, SlotState]:
    """`conv_state` [K - 1, C], oldest token first, in the input's dtype: nothing is lost. A filter of one tap keeps nothing."""
    x, weight = call["x"], call["weight"]
    channels, width = (int(extent) for extent in weight.shape)
    return {"conv_state": SlotState((width - 1, channels), x.dtype)} if width > 1 else {}
