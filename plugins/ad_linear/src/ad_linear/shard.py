"""How linear attention divides over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

LIGHTNING_HEADS = ShardRule(
    op="ad_linear::lightning",
    axis="tensor",
    splits={"query": 2, "key": 2, "value": 2, "log_decay": 0, "state": 0},
    output=2,
    divides="num_heads",
)
MLSTM_HEADS = ShardRule(
    op="ad_linear::mlstm",
    axis="tensor",
    splits={"query": 2, "key": 2, "value": 2, "input_gate": 2, "forget_gate": 2, "memory": 0, "peak": 0},
    output=2,
    divides="num_heads",
)
"""By heads, which know nothing of each other. States are cut at their first dimension."""
