"""Tiny models of transformers with recurrences by channel, through an engine: what it answers is what the unpatched model says."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from ad_core import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

FREQUENT = 17
"""An id that ends a text in the midst of prompts."""
_IDS = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96}
MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "recurrent_gemma": (
        {"num_attention_heads": 4, "lru_width": 64, "attention_window_size": 8, "num_key_value_heads": 4, "head_dim": 16},
        {"rg_lru": 3},
    ),
    "rwkv": ({"context_length": 128, "attention_hidden_size": 64, "rescale_every": 2}, {"wkv4": 4, "token_shift": 8}),
    "qwen4_exp_text": (
        {
            **{"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "initializer_range": 0.125},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "moe_intermediate_size": 32, "num_experts": 4},
            **{"shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "hc_count": 2, "hc_lowrank": 16},
            **{"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4},
            **{"ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 128, "eos_token_id": FREQUENT},
        },
        {"token_shift": 2},
    ),
}
"""Configuration by model type, and how often each op must be found."""

LENGTH = 16


def tiny(kind: str) -> torch.nn.Module:
    """Random weights; unit norms and zero biases get noise, since they would hide mistakes."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**copy.deepcopy({**_IDS, **MODELS[kind][0]}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv", pytest.param("qwen4_exp_text", marks=pytest.mark.slow)])
def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(kind):
    model = tiny(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 120, (count,), generator=draw).tolist() for count in (1, 9, 33)]
    prompts[2][6] = prompts[2][7] = prompts[2][13] = FREQUENT
    settings: dict[str, Any] = {"max_batch_tokens": 8, "page_size": 4, "checkpoint_interval": 16, "max_requests": 4, "max_model_len": 128}
    with LLM(model, **settings) as llm:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "capture left other weights behind"
        found = Counter(claim.op for claim in llm.plan.claims)
        assert {op.split("::")[1]: count for op, count in found.items() if op.startswith("ad_rnn::")} == MODELS[kind][1]
        oracle = copy.deepcopy(model)
        for _ in range(2):  # the second time from checkpoints of the first
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True))
            for output, prompt in zip(outputs, prompts, strict=True):
                assert output.error is None, output.error
                answer = output.outputs[0].token_ids
                with torch.no_grad():
                    logits = oracle(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
                behind = logits.amax(1) - logits[torch.arange(LENGTH), torch.tensor(answer)]
                assert behind.max() <= 1e-3, f"prompt of {len(prompt)}: token {int(behind.argmax())} is not the oracle's"
        llm._engine.cache.audit()


def test_a_model_that_has_halved_its_weights_already_is_captured_as_it_is():
    model = tiny("rwkv")
    with torch.no_grad():
        wanted = model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits[0, -1]
    with LLM(model, max_model_len=64) as llm:
        (output,) = llm.generate([[5, 6, 7, 8]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    assert output.outputs[0].token_ids == [int(wanted.argmax())]
