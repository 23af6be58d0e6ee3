"""Tiny models with weights that show faults: a wide spread, and noise on whatever starts as zeros or ones."""

from __future__ import annotations

import copy

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": {**_SMALL, "num_key_value_heads": 2, "initializer_range": 0.125, "tie_word_embeddings": True},
    "gemma2": {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "initializer_range": 0.125},
    "qwen3": {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.125},
    "mixtral": {**_SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.125},
    "qwen3_moe": {
        **_SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "initializer_range": 0.125,
    },
    "gpt2": {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.125},
    "opt": {
        "vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
        "word_embed_proj_dim": 32, "init_std": 0.125,
    },
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.125},
}  # fmt: skip


def build(kind: str, **changes):
    """A tiny model of a transformers type, in float32 and eval mode, the same at every call."""
    config = CONFIG_MAPPING[kind](**copy.deepcopy({**CONFIGS[kind], **_IDS, **changes}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 96, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def run(graph, ids: torch.Tensor) -> torch.Tensor:
    """The graph on ids, with positions if it takes them."""
    values = {"input_ids": ids, "position_ids": positions(ids)}
    with torch.no_grad():
        return graph(*(values[node.target] for node in graph.graph.nodes if node.op == "placeholder"))


class Block(torch.nn.Module):
    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.inner = torch.nn.Linear(width, width)
        self.scale = scale

    def forward(self, x):
        return x + torch.tanh(self.inner(x)) * self.scale


class Toy(torch.nn.Module):
    """A language model without any attention: an embedding, blocks, a head."""

    def __init__(self, blocks: int = 4, width: int = 16, vocabulary: int = 48):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, input_ids, position_ids=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
