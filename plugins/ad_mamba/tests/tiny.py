"""Tiny models with random weights, one of every type that needs nothing but attention, convolutions and selective state spaces.

Weights spread widely, so logits do; nothing that starts constant stays so (unit norms and zero biases hide bugs).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 64, "initializer_range": 0.125, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ATTENTION = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
_MAMBA1 = {"num_hidden_layers": 2, "time_step_rank": 8, "intermediate_size": 96}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1,
    "mamba2": {"num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "bamba": {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 128, "head_dim": 16},
    "granitemoehybrid": {
        **{**_ATTENTION, **_MAMBA2, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "mamba_expand": 2},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "position_embedding_type": "nope"},
    },
    "nemotron_h": {
        **{**_ATTENTION, "head_dim": 16, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "ssm_state_size": 16, "n_groups": 2},
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 32},
        "moe_shared_expert_intermediate_size": 32,
    },
    "jamba": {
        **{**_ATTENTION, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_dt_rank": 8},
    },
    "zamba": {
        **{**_ATTENTION, "num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
        **{"n_mamba_heads": 2, "mamba_dt_rank": 8, "mamba_d_state": 16},
    },
    "zamba2": {
        **{**_ATTENTION, "num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
        **{"mamba_d_state": 16, "n_mamba_heads": 8, "chunk_size": 8, "adapter_rank": 8, "use_mem_rope": True},
    },
    "lfm2": {**_ATTENTION, "num_hidden_layers": 3, "block_multiple_of": 8, "layer_types": ["conv", "full_attention", "conv"]},
}


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
def oracle(module: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The original module's logits [len(answer), V] for each token of the answer: one sequence, no cache, nothing of ours."""
    logits: torch.Tensor = module(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].float()
