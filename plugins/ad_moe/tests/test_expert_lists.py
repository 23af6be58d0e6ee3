"""A user's own model whose experts are a list of modules: read by trying, captured without unrolling, served, stacked once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ad_core import LLM, SamplingParams
from ad_moe.match.expert_lists import ROUTINGS, read


class Expert(nn.Module):
    def __init__(self, width: int, inner: int, activation: Any = F.silu):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*sizes, bias=False) for sizes in ((width, inner), (inner, width), (width, inner)))
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Plain(nn.Module):
    """Two projections."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.fc_out(F.gelu(self.fc_in(x)))


class Block(nn.Module):
    """A loop over all experts, each with the tokens that chose it."""

    def __init__(self, experts: list[nn.Module], width: int, top_k: int, routing: str, logits: bool = True):
        super().__init__()
        self.top_k, self.routing, self.logits = top_k, routing, logits
        self.gate = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden_states):
        batch, length, width = hidden_states.shape
        flat = hidden_states.view(-1, width)
        logits = self.gate(flat)
        weights, selected = self.route(logits)
        weights = weights.to(flat.dtype)
        out = torch.zeros_like(flat)
        mask = F.one_hot(selected, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(mask[number])
            out.index_add_(0, token, expert(flat[token]) * weights[token, choice, None])
        out = out.view(batch, length, width)
        return (out, logits) if self.logits else out

    def route(self, logits):
        if self.routing == "best, softmax":
            best, selected = logits.topk(self.top_k, -1)
            return best.softmax(-1), selected
        scores = logits.float().sigmoid() if self.routing.startswith("sigmoid") else logits.softmax(-1, dtype=torch.float32)
        weights, selected = scores.topk(self.top_k, -1)
        return (weights / weights.sum(-1, keepdim=True) if self.routing.endswith("normalised") else weights), selected


class Layer(nn.Module):
    def __init__(self, width: int, block: nn.Module):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.block = block

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        result = self.block(self.norms[1](x))
        return x + (result[0] if isinstance(result, tuple) else result)


class Model(nn.Module):
    def __init__(self, make_block: Any, width: int = 16, layers: int = 2):
        super().__init__()
        self.embed, self.places = nn.Embedding(96, width), nn.Embedding(64, width)
        self.layers = nn.ModuleList([Layer(width, make_block()) for _ in range(layers)])
        self.head = nn.Linear(width, 96, bias=False)

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model(experts: int = 4) -> nn.Module:
    torch.manual_seed(0)
    made = Model(lambda: Block([Expert(16, 24) for _ in range(experts)], 16, 2, "softmax, best, normalised"))
    for parameter in made.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("routing", [*ROUTINGS, "best, softmax"])
def test_every_routing_is_read(routing, logits):
    reading = read(Block([Expert(16, 24) for _ in range(5)], 16, 2, routing, logits))
    assert reading is not None
    same = "softmax, best, normalised" if routing == "best, softmax" else routing
    assert (reading.routing, reading.choices, reading.gives_logits) == (same, 2, logits)
    assert reading.projections == ("w1", "w3", "w2")


@pytest.mark.parametrize(("inner", "top_k"), [(24, 1), (16, 3)])
def test_widths_and_counts_do_not_confuse_it(inner, top_k):
    reading = read(Block([Expert(16, inner) for _ in range(4)], 16, top_k, "softmax, best"))
    assert reading is not None
    assert (reading.choices, reading.projections) == (top_k, ("w1", "w3", "w2"))


def test_two_projections_and_their_activation():
    reading = read(Block([Plain(16, 24) for _ in range(4)], 16, 2, "softmax, best"))
    assert reading is not None
    assert (reading.activation, reading.projections) == ("gelu", ("", "fc_in", "fc_out"))


def test_weights_on_meta_are_not_needed():
    with torch.device("meta"):
        block = Block([Expert(4096, 14336) for _ in range(8)], 4096, 2, "softmax, best, normalised")
    assert read(block) is not None
    assert all(parameter.is_meta for parameter in block.parameters())


def test_what_computes_something_else_is_left_alone():
    class Scaled(Block):
        def route(self, logits):
            weights, selected = super().route(logits)
            return 1.5 * weights, selected

    assert read(Scaled([Expert(16, 24) for _ in range(4)], 16, 2, "softmax, best")) is None
    assert read(Block([Expert(16, 24, torch.sin) for _ in range(4)], 16, 2, "softmax, best")) is None
    assert read(nn.ModuleList([nn.Linear(4, 4)])) is None


def test_it_is_served_like_full_recompute_and_its_stacks_are_made_once():
    module = model()
    with LLM(
        module, max_model_len=64, max_batch_tokens=8, page_size=4, max_requests=4, memory="1MiB", allow_plugins=["attention", "moe"],
        eos_token_id=[],
    ) as llm:  # fmt: skip
        assert [claim.by for claim in llm.plan.claims if claim.op == "ad_moe::moe"] == ["seam experts.list"] * 2
        (stacking,) = [each for each in llm.plan.passes if each.name == "moe.stack_experts"]
        assert stacking.matched == 6
        prompts = [[5], list(range(9)), list(range(33))]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = output.outputs[0].token_ids
            tokens = torch.tensor([[*prompt, *answer[:-1]]])
            logits = module(tokens, torch.arange(tokens.shape[1])[None])[0, len(prompt) - 1 :]
            behind = logits.amax(1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
            assert float(behind.max()) < 1e-3
