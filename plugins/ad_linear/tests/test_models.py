"""Tiny models of transformers with linear attention, through an engine: what it answers is what the unpatched model says."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from ad_core import LLM, SamplingParams

transformers = pytest.importorskip("transformers")

_BASE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "initializer_range": 0.125}
_LIGHTNING = {
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_local_experts": 4, "block_size": 16},
    "layer_types": ["full_attention", "linear_attention", "full_attention", "linear_attention"],
}
_MLSTM = {
    **{"embedding_dim": 64, "num_blocks": 4, "num_heads": 4, "chunk_size": 16, "ffn_round_up_to_multiple_of": 8},
    **{"max_inference_chunksize": 128, "qk_dim_factor": 1.0, "autocast_kernel_dtype": "float32"},
}

MODELS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "minimax": (_LIGHTNING, {"lightning": 2}),
    "xlstm": (_MLSTM, {"mlstm": 4}),
}
"""Configuration by model type, and how often each op must be found."""

LENGTH = 16


def tiny(kind: str) -> torch.nn.Module:
    """Random weights; unit norms and zero biases get noise, since they would hide mistakes."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**copy.deepcopy({**_BASE, **MODELS[kind][0]}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", list(MODELS))
def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(kind):
    model = tiny(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 120, (count,), generator=draw).tolist() for count in (1, 9, 33)]
    settings: dict[str, Any] = {"max_batch_tokens": 8, "page_size": 4, "checkpoint_interval": 16, "max_requests": 4, "max_model_len": 128}
    with LLM(model, **settings) as llm:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "capture left other weights behind"
        found = Counter(claim.op for claim in llm.plan.claims)
        assert {op.split("::")[1]: count for op, count in found.items() if op.startswith("ad_linear::")} == MODELS[kind][1]
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


def test_a_model_that_goes_through_long_inputs_in_pieces_is_captured_whole():
    model = tiny("xlstm")
    model.config.max_inference_chunksize = 40
    with LLM(copy.deepcopy(model), max_model_len=128, checkpoint_interval=16, page_size=4) as llm:
        prompt = list(range(5, 75))
        (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    model.config.max_inference_chunksize = 1000
    with torch.no_grad():
        answer = output.outputs[0].token_ids
        logits = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
    assert answer == logits.argmax(1).tolist()
