"""Tiny models of transformers with random weights, made so that a mistake shows, and the oracle for what they must answer.

Weights spread widely, so logits do; nothing that starts constant stays so (unit norms and zero biases hide bugs); windows and
chunks are shorter than the prompts, and every kind of layer of a model is there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
MAX_LENGTH = 128

_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.125, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BLOCKS = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": MAX_LENGTH},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
_ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BLOCKS,
    "qwen3": _BLOCKS,
    "gpt2": {"n_positions": MAX_LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {
        **{"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
        **{"max_position_embeddings": MAX_LENGTH, "init_std": 0.125},
    },
    "gemma2": {**_BLOCKS, **_ALTERNATING, "query_pre_attn_scalar": 16},
    "mixtral": {**_BLOCKS, "num_local_experts": 4, "sliding_window": None},
    "gpt_oss": {
        **{**_BLOCKS, **_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
        "rope_parameters": {**_YARN, "rope_theta": 150000.0},
    },
    "llama4_text": {
        **{**_BLOCKS, "intermediate_size_mlp": 96, "num_local_experts": 4, "no_rope_layers": [1, 0], "attention_chunk_size": 8},
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_LENGTH},
}
"""By model type: grouped heads, query norms, learned positions, windows with a soft-cap, experts, sinks, chunks, ALiBi twice."""

WINDOWED = ("gemma2", "gpt_oss", "llama4_text")


def tiny(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the type in float32, in eval mode: the same weights at every call. `changes` go to its configuration."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](**copy.deepcopy({**_COMMON, **CONFIGS[kind], **changes}))
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model.requires_grad_(False)


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt without special tokens."""
    return torch.randint(4, VOCABULARY - 8, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()


@torch.no_grad()
def logits_of(module: nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """The oracle's logits [S, V] of one whole sequence: no cache, nothing of ours."""
    config = getattr(module, "config", None)
    given = {"use_cache": False} if config is not None else {}
    result = module(torch.tensor([tokens]), **given)
    logits: torch.Tensor = getattr(result, "logits", result)
    return logits[0].float()


def greedy(module: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that follow, each from a full recompute."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(module, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
