"""How a causal convolution divides over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

CHANNELS = ShardRule(
    op="ad_conv::causal_conv1d",
    axis="tensor",
    splits={"x": 2, "weight": 0, "bias": 0, "conv_state": 1},
    output=2,
    divides="num_channels",
)
"""By channels: each is filtered on its own. The state is cut at its channels."""
