"""How routed experts divide over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

EXPERTS = ShardRule(
    op="ad_moe::moe",
    axis="expert",
    splits={"up": 0, "down": 0, "gate": 0, "up_bias": 0, "down_bias": 0},
    output="sum",
    divides="num_experts",
)
"""By experts: a rank has E / ranks of them and gives the sum over its own. `selected` then counts from the rank's first expert: what
is outside of its range counts nothing, by the op's definition, so a subtraction is all that a strategy has to put before the op."""

LINEAR_EXPERTS = ShardRule(op="ad_moe::routed_linear", axis="expert", splits={"weight": 0}, output="sum", divides="num_experts")
"""The same for one projection: a choice that is no expert of the rank gives zero, so the ranks' results add up."""
