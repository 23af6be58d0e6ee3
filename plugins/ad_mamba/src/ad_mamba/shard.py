"""How the recurrences divide over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

CHANNELS = ShardRule(
    op="ad_mamba::selective_scan",
    axis="tensor",
    splits={"u": 2, "delta": 2, "A": 0, "D": 0, "z": 2, "delta_bias": 0, "ssm_state": 0},
    output=2,
    divides="num_channels",
)
"""By channels: each has its own recurrence. B and C are the same for all of them, so every rank has them whole."""

GROUPS = ShardRule(
    op="ad_mamba::ssd",
    axis="tensor",
    splits={"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0, "z": 2, "dt_bias": 0, "ssm_state": 0},
    output=2,
    divides="num_groups",
)
"""By groups: each rank has whole groups of B and C with the heads that read them."""
