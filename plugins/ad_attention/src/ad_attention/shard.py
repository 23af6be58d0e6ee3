"""How softmax attention divides over ranks."""

from __future__ import annotations

from ad_core.api import ShardRule

HEADS = ShardRule(
    op="ad_attention::attention",
    axis="tensor",
    splits={
        "query": 2,
        "key": 2,
        "value": 2,
        "key_bias": 2,
        "distance_bias": 2,
        "query_sinks": 2,
        "sinks": 0,
        "alibi_slopes": 0,
        "rel_bias": 0,
        "key_pages": 0,
        "value_pages": 0,
        "key_bias_pages": 0,
    },
    output=2,
    divides="num_kv_heads",
)
"""By heads: each rank has whole groups of query heads with their key/value head. Pools are cut at the first dimension of an entry."""
