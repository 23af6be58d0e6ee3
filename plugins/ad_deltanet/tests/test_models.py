"""Tiny models of transformers with delta rules, through an engine: what it answers is what the unpatched model says."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from ad_core import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

_BASE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 128}
_IDS = {"initializer_range": 0.125, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_DELTA = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4}
_KIMI = {
    **{"linear_head_dim": 16, "linear_num_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"v_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "moe_intermediate_size": 32,
}

MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen3_5_text": (_DELTA, {"gated_delta": 3}),
    "qwen3_next": ({**_DELTA, **_EXPERTS}, {"gated_delta": 3}),
    "qwen3_5_moe_text": ({**_DELTA, **_EXPERTS}, {"gated_delta": 3}),
    "olmo_hybrid": (_DELTA, {"gated_delta": 3}),
    "kimi_linear": (_KIMI, {"kda": 2}),
    "bailing_hybrid": ({**_KIMI, "n_group": 2, "topk_group": 1}, {"kda": 2}),
}
"""Configuration by model type, and how often each op must be found."""

FAST = ("qwen3_5_text", "kimi_linear")
LENGTH = 16


def tiny(kind: str) -> torch.nn.Module:
    """Random weights that spread, so that logits do; unit norms and zero biases get noise, since they would hide mistakes."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**copy.deepcopy({**_BASE, **_IDS, **_HEADS, **MODELS[kind][0]}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS])
def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(kind):
    model = tiny(kind)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 120, (count,), generator=draw).tolist() for count in (1, 9, 33)]
    settings: dict[str, Any] = {"max_batch_tokens": 8, "page_size": 4, "checkpoint_interval": 16, "max_requests": 4, "max_model_len": 128}
    with LLM(copy.deepcopy(model), **settings) as llm:
        found = Counter(claim.op for claim in llm.plan.claims)
        assert {op.split("::")[1]: count for op, count in found.items() if op.startswith("ad_deltanet::")} == MODELS[kind][1]
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
