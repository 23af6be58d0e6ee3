"""Tiny models of transformers with compressed keys, through an engine: what it answers is what the unpatched model says."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from ad_core import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

_BASE = {
    **{"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 128},
    **{"moe_intermediate_size": 32, "num_experts_per_tok": 2, "initializer_range": 0.125},
}
_ROPE = {"rope_type": "default", "partial_rotary_factor": 0.5}
_COMPRESSED = {
    **{"num_key_value_heads": 1, "q_lora_rank": 24, "o_lora_rank": 16, "o_groups": 2, "n_routed_experts": 4, "hc_mult": 2},
    **{"hc_sinkhorn_iters": 3, "sliding_window": 5, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 3},
    "compress_rates": {"compressed_sparse_attention": 3, "heavily_compressed_attention": 7},
    "rope_parameters": {"main": {**_ROPE, "rope_theta": 10000.0}, "compress": {**_ROPE, "rope_theta": 160000.0}},
}
_INDEXED = {
    **{"num_key_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "shared_expert_intermediate_size": 32, "num_experts": 4, "hc_count": 2, "hc_lowrank": 16},
    **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 9, "indexer_compress_ratio": 3},
}

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "compressed": (
        "deepseek_v4",
        {
            **_COMPRESSED,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
            "mlp_layer_types": ["hash_moe", "moe"],
        },
        {"compress": 3, "select": 1, "compressed": 2},
    ),
    "compressed beside a window": (
        "deepseek_v4",
        {**_COMPRESSED, "layer_types": ["sliding_attention", "compressed_sparse_attention"], "mlp_layer_types": ["moe", "moe"]},
        {"attention": 1, "compress": 2, "select": 1, "compressed": 1},
    ),
    "indexed": (
        "qwen4_exp_text",
        {**_INDEXED, "layer_types": ["linear_attention", "full_attention"]},
        {"compress": 2, "select": 1, "selected": 1},
    ),
}
"""Model type, configuration, and how often each op must be found. Blocks fit neither pages nor chunks."""

FAST = ("compressed", "indexed")
LENGTH = 16


def tiny(kind: str) -> torch.nn.Module:
    """Random weights that spread, so that logits do; unit norms and zero biases get noise, since they would hide mistakes."""
    name, settings, _ = MODELS[kind]
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**copy.deepcopy({**_BASE, **settings, "num_hidden_layers": len(settings["layer_types"])}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.5 * torch.randn(parameter.shape))
        for buffer_name, buffer in model.named_buffers():
            if "tid2eid" in buffer_name:
                buffer.random_(4)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS])
def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(kind):
    model = tiny(kind)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 120, (count,), generator=draw).tolist() for count in (1, 9, 33)]
    settings: dict[str, Any] = {"max_batch_tokens": 8, "page_size": 4, "checkpoint_interval": 16, "max_requests": 4, "max_model_len": 64}
    with LLM(copy.deepcopy(model), memory="8MiB", **settings) as llm:
        found = Counter(claim.op for claim in llm.plan.claims)
        assert {op.split("::")[1]: count for op, count in found.items() if op.startswith("ad_attention::")} == MODELS[kind][2]
        for _ in range(2):  # the second time from checkpoints of the first
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True))
            for output, prompt in zip(outputs, prompts, strict=True):
                assert output.error is None, output.error
                answer = output.outputs[0].token_ids
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
                behind = logits.amax(1) - logits[torch.arange(LENGTH), torch.tensor(answer)]
                assert behind.max() <= 1e-3, f"prompt of {len(prompt)}: token {int(behind.argmax())} is not the oracle's"
        llm._engine.cache.audit()
