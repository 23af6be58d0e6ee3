"""What capture costs grows with what is different in a model, not with how large or how deep it is."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest

from ad_core.plan import Plan
from tests.zoo.big import measure, plan_of, shapes

_SIZES = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "max_position_embeddings": 128},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
}
EXPERTS = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts"}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SIZES, "head_dim": 16, "num_experts_per_tok": 2},
    "mixtral": {**_SIZES, "head_dim": 16},
    "deepseek_v3": {
        **{**_SIZES, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 0},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 2, "topk_group": 1},
    },
}


def captured(kind: str, layers: int, experts: int) -> tuple[Plan, float]:
    """The plan, and seconds of the processor."""
    gc.collect()
    start = time.process_time()
    plan = plan_of(kind, {**MODELS[kind], "num_hidden_layers": layers, EXPERTS[kind]: experts})
    return plan, time.process_time() - start


@pytest.mark.parametrize("kind", [kind if kind == "qwen3_moe" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS])
def test_equal_layers_and_experts_cost_no_more_than_their_nodes(kind):
    several, few, many, wide = (captured(kind, *sizes) for sizes in ((4, 4), (2, 4), (8, 4), (2, 64)))
    a_layer = (several[0].nodes - few[0].nodes) // 2
    assert a_layer > 0
    assert many[0].nodes - few[0].nodes == 6 * a_layer
    assert len(many[0].claims) == 4 * len(few[0].claims)
    assert many[1] < 4 * few[1]
    assert wide[0].nodes == few[0].nodes
    assert wide[1] < 2 * few[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes())
def test_a_large_model_is_captured_without_its_weights(name):
    """DeepSeek-V3, of 671 thousand million parameters, in two minutes of the processor; the others are smaller."""
    result = measure(**{key: shapes()[name][key] for key in ("model_type", "config")})
    assert result["cpu_seconds"] < 120
    layers = shapes()[name]["config"].get("num_hidden_layers", 1)
    assert sum(result["ops"].values()) >= layers
