"""The model in transformers' form, so that it can be stored in a directory: a configuration, and a class that has `Flash` inside."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .flash import PATTERN, Flash


class FlashConfig(PretrainedConfig):
    model_type = "flash_like"

    def __init__(
        self, vocab_size=256, hidden_size=64, num_attention_heads=4, num_meta_tokens=8, mixers=PATTERN, max_position_embeddings=4096, **rest
    ):
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.num_meta_tokens, self.mixers, self.max_position_embeddings = num_meta_tokens, list(mixers), max_position_embeddings
        super().__init__(**rest)


class FlashForCausalLM(PreTrainedModel):
    config_class = FlashConfig

    def __init__(self, config: FlashConfig):
        super().__init__(config)
        self.model = Flash(config.vocab_size, config.hidden_size, config.num_attention_heads, config.num_meta_tokens, config.mixers)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_) -> CausalLMOutput:
        return CausalLMOutput(logits=self.model(input_ids, position_ids))
