"""Models whose scores get a bias of each query for each distance, and sinks of each query: their author's module says the same."""

from __future__ import annotations

from typing import Any

import pytest

from ..zoo.check import check
from ..zoo.models import Entry

pytest.importorskip("transformers", minversion="5.23")

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 8,
    "d_rel": 8,
    "rel_extent": 16,
    "log_scaling_n_floor": 4,
    "log_scaling_alpha": 0.5,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
    "max_position_embeddings": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.125,
}
"""Queries and biases are scaled by their position from the fifth on, and clipped where the norms of `CLIPPED` say so."""
CLIPPED = {"unpadded_vocab_size": 128, "eos_token_id": 2, "n_layers_per_attn_res_block": 2, "qk_l2_clip_threshold": 2.5}
MODELS: dict[str, dict[str, Any]] = {
    "inkling_text": {"mlp_layer_types": ["sparse"] * 4, "intermediate_size": 96, "n_shared_experts": 1},
    "inkling2_text": {**CLIPPED, "rel_l2_clip_threshold": 1.0},
    "inkling2_loop_text": {
        **CLIPPED,
        "num_hidden_layers": 6,
        "layer_types": ["hybrid_sliding", "hybrid"] * 3,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
        "loop_num_passes": 3,
        "loop_gate_rank": 8,
    },
}
CALLS = {"inkling_text": 4, "inkling2_text": 4, "inkling2_loop_text": 10}


@pytest.mark.parametrize("model_type", ["inkling_text", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if "2" in name)])
def test_answers_are_those_of_the_authors_module(model_type):
    entry = Entry(model_type, {**SIZES, **MODELS[model_type]}, 0, 0.05, "ok", "")
    result = check(entry)
    assert result.status == "pass", f"{result.stage}: {result.reason}"
    assert result.mixers["ad_attention::attention"] == CALLS[model_type]
