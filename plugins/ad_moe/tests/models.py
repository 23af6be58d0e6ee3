"""Tiny models with routed experts, made so that a mistake shows, and the oracle for what they must answer.

Weights spread widely, so logits do; nothing that starts constant stays so: unit norms, zero biases and a router's zero correction
hide bugs. There are more experts than a token goes through, fewer groups than experts, and layers with experts beside layers without.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
MAX_LENGTH = 128

_COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "initializer_range": 0.125, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": MAX_LENGTH},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"moe_intermediate_size": 32, "num_experts_per_tok": 2},
}
_LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    **{"qk_head_dim": 24, "head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse"]}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, **_WINDOW},
    "aria_text": {"moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_topk": 2},
    "axk1": {**_LATENT, **_DENSE_FIRST},
    "beam": {"num_experts": 4, "n_group": 2, "topk_group": 1, **_DENSE_FIRST, **_WINDOW},
    "cohere2_moe": {"num_experts": 4, "mlp_layer_types": ["sparse", "sparse"], **_WINDOW},
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_LENGTH, "num_key_value_heads": 1},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "n_shared_experts": 1},
    "deepseek_v3": _LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "exaone_moe": {"num_experts": 4, "num_shared_experts": 1, "n_group": 2, "topk_group": 1, **_DENSE_FIRST, **_WINDOW},
    "flex_olmo": {"num_experts": 4},
    "flint": {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 32, **_WINDOW},
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "hidden_size_per_layer_input": 16},
        **{"vocab_size_per_layer_input": VOCABULARY, "num_global_key_value_heads": 2, "global_head_dim": 32, **_WINDOW},
    },
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_LATENT, **_DENSE_FIRST},
    "gpt_oss": {"num_local_experts": 4, "rope_parameters": {**_YARN, "rope_theta": 150000.0}, **_WINDOW},
    "granitemoe": {"num_local_experts": 4},
    "granitemoe_swa": {"num_local_experts": 4, "layer_rope_theta": [10000.0, 10000.0], **_WINDOW},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2]},
    "hy_v3": {"num_experts": 4, **_DENSE_FIRST},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16, "num_key_value_heads": 2},
    "kolibri1": {"num_local_experts": 4, "shared_expert_intermediate_size": 32, **_WINDOW},
    "laguna": {
        **{"num_experts": 4, "shared_expert_intermediate_size": 32, "num_attention_heads_per_layer": [4, 4]},
        **{**_DENSE_FIRST, **_WINDOW},
    },
    "llama4_text": {
        **{"intermediate_size_mlp": 96, "num_local_experts": 4, "no_rope_layers": [1, 0], "attention_chunk_size": 8},
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "longcat_flash": {
        **{**_LATENT, "num_layers": 2, "ffn_hidden_size": 96, "moe_topk": 3, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    },
    "mellum": {"num_local_experts": 4, "mlp_layer_types": ["sparse", "sparse"], **_WINDOW},
    "mimo_v2_flash": {"n_routed_experts": 4, "moe_layer_freq": [0, 1], "n_group": 2, "topk_group": 1, "v_head_dim": 16, **_WINDOW},
    "minimax_m2": {"num_local_experts": 4},
    "minimax_m3_vl_text": {
        **{"num_local_experts": 4, "dense_intermediate_size": 96, "shared_intermediate_size": 32, "rotary_dim": 8},
        **{"mlp_layer_types": ["sparse", "sparse"], "layer_types": ["full_attention", "full_attention"]},
        **{"index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 4},
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4},
    "solar_open": {"n_routed_experts": 4, "n_shared_experts": 1},
}
"""Every type of transformers that has routed experts and no other mixer than softmax attention, found and built by tests."""


def plain(kind: str, **changes: Any) -> nn.Module:
    """A model of the type as transformers builds it, in eval mode, on the device that is set."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[kind](**copy.deepcopy({**_COMMON, **CONFIGS[kind], **changes}))
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


def tiny(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A model of the type in float32, in eval mode: the same weights at every call. `changes` go to its configuration."""
    torch.manual_seed(seed)
    model = plain(kind, **changes)
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        corrections = [buffer for name, buffer in model.named_buffers() if "bias" in name]
        for tensor in [*model.parameters(), *corrections]:
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=noise).to(tensor.dtype))
    return model.requires_grad_(False)


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt without special tokens."""
    return torch.randint(4, VOCABULARY - 8, (length,), generator=torch.Generator().manual_seed(100 * seed + length)).tolist()


@torch.no_grad()
def logits_of(module: nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """The oracle's logits [S, V] of one whole sequence: no cache, nothing of ours."""
    logits: torch.Tensor = module(torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0].float()
