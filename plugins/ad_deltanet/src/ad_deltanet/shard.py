"""How delta rules divide over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

_TOKENS = {"query": 2, "key": 2, "value": 2, "g": 2, "beta": 2, "state": 0}

GATED_HEADS = ShardRule(op="ad_deltanet::gated_delta", axis="tensor", splits=_TOKENS, output=2, divides="num_key_heads")
KDA_HEADS = ShardRule(op="ad_deltanet::kda", axis="tensor", splits=_TOKENS, output=2, divides="num_key_heads")
"""By heads: each rank has whole groups of value heads with their query and key head. A state is cut at its first dimension."""
