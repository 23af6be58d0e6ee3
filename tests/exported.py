"""Real graphs to test on: small hand-written modules and tiny transformers models, exported as capture exports them.

The attention seam here is a few lines of its own, so that these tests do not depend on the plugin that they are below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api import Pass, PassContext, PassReport
from ad_core.graph.edit import flat_module
from ad_core.graph.ops import define_op
from ad_core.passes.core import clean_passes

ATTENTION = "ad_testgraph::attention"
VOCABULARY = 96


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2).contiguous()


attention = define_op(
    f"{ATTENTION}(Tensor query, Tensor key, Tensor value, float scale) -> Tensor",
    _attend,
    lambda query, key, value, scale: query.new_empty(*query.shape[:-1], value.shape[-1]),
)
"""A canonical op: causal, [B, S, heads, D]."""


class Mask:
    """What the mask interface returns in the place of a tensor: nothing can be computed on it."""

    def to(self, *args: Any, **kwargs: Any) -> Mask:
        return self


def _seam(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> Any:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), float(scale)), None


TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma2": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "sliding_window": 8},
    },
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32},
    "phi": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"num_local_experts": 4, "sliding_window": None},
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "camembert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "is_decoder": True},
}


def tiny_model(kind: str, attention_implementation: str | None = None) -> nn.Module:
    """A random tiny model. `attention_implementation` "seam" puts the canonical op in; "sdpa" and "eager" are the library's."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("ad_testgraph", _seam)
    ALL_MASK_ATTENTION_FUNCTIONS.register("ad_testgraph", lambda *args, **kwargs: Mask())
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    config = CONFIG_MAPPING[kind](**common, **TINY[kind])
    torch.manual_seed(0)
    options = {}
    if attention_implementation:
        options = {"attn_implementation": {"seam": "ad_testgraph"}.get(attention_implementation, attention_implementation)}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights that spread, and no unit norms or zero biases, which hide mistakes
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
    return model.requires_grad_(False)


class Small(nn.Module):
    """A model without mixer: embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids))


class Logits(nn.Module):
    """A transformers model with one signature: ids, and positions if wanted, in; logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        given = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, use_cache=False, **given).logits


def export(module: nn.Module, *, positions: bool = False) -> GraphModule:
    """The module's graph with a symbolic batch and length, flat inputs, and whatever else export leaves in it."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=256)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    inputs = sample(3, 13, positions=positions)  # sizes that nothing else has
    program = torch.export.export(
        module.eval(),
        tuple(tensor.to(device) for tensor in inputs),
        dynamic_shapes=({0: batch, 1: length},) * len(inputs),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    return flat_module(program.module())


def export_model(
    kind: str, attention_implementation: str = "seam", *, positions: bool = True, dtype: torch.dtype = torch.float32
) -> GraphModule:
    """A tiny transformers model as a graph."""
    with torch.no_grad():
        return export(Logits(tiny_model(kind, attention_implementation).to(dtype)), positions=positions)


def sample(batch: int, length: int, *, positions: bool) -> tuple[torch.Tensor, ...]:
    """Ids that avoid special ones, and positions."""
    ids = torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch + length))
    return (ids, torch.arange(length)[None].repeat(batch, 1)) if positions else (ids,)


def run(graph: GraphModule, batch: int = 2, length: int = 11, **more: torch.Tensor) -> torch.Tensor:
    """The graph's logits for a sample; `more` are further inputs by name."""
    ids, positions = sample(batch, length, positions=True)
    values = {"input_ids": ids, "position_ids": positions, **more}
    with torch.no_grad():
        result = graph(*(values[str(node.target)] for node in graph.graph.nodes if node.op == "placeholder"))
    return result[0] if isinstance(result, list | tuple) else result


def apply(graph: GraphModule, passes: Sequence[Pass], device: str = "cpu") -> list[PassReport]:
    """Runs passes in the order given, without a manager."""
    reports = []
    for each in passes:
        reports.append(each.run(graph, PassContext(torch.device(device), None)))
        graph.graph.lint()
        graph.recompile()
    return reports


def cleaned(graph: GraphModule) -> GraphModule:
    """The graph after the core's clean-up."""
    apply(graph, clean_passes())
    return graph


def ops(graph: GraphModule) -> list[str]:
    """Names of the ops of the graph, in order, with overload."""
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
