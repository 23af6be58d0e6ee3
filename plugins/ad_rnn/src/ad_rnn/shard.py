"""How recurrences by channel divide over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

RG_LRU_CHANNELS = ShardRule(op="ad_rnn::rg_lru", axis="tensor", splits={"x": 2, "gate": 2, "state": 0}, output=2, divides="channels")
WKV4_CHANNELS = ShardRule(
    op="ad_rnn::wkv4",
    axis="tensor",
    splits={"key": 2, "value": 2, "time_decay": 0, "time_first": 0, "state": 1},
    output=2,
    divides="channels",
)
TOKEN_SHIFT_CHANNELS = ShardRule(op="ad_rnn::token_shift", axis="tensor", splits={"x": 2, "state": 0}, output=2, divides="channels")
"""By channels, which know nothing of each other."""
