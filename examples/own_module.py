"""A language model written on the spot, unmodified, as a function of whole sequences and as an engine.

    python examples/own_module.py

Needs ad-attention: `F.scaled_dot_product_attention` below is what its matcher finds. The weights are random, so the answer means nothing,
but both ways must agree on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ad_core
from ad_core import LLM, SamplingParams

VOCABULARY, WIDTH, HEADS = 256, 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids) + self.places(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    torch.manual_seed(0)
    model, prompt = Model().eval(), [3, 1, 4, 1, 5]
    graph = ad_core.compile(model, max_model_len=128)
    ids = list(prompt)
    for _ in range(8):  # the whole sequence again for every token: slow, and right
        ids.append(int(graph(torch.tensor([ids]))[0, -1].argmax()))
    with LLM(model, max_model_len=128, memory="4MiB") as llm:
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8))
        print("whole sequences:", ids[len(prompt) :])
        print("the engine:     ", output.outputs[0].token_ids)
        print("claimed by:     ", llm.plan.claims[0].by)
    if ids[len(prompt) :] != output.outputs[0].token_ids:
        raise SystemExit("the two ways part")


if __name__ == "__main__":
    main()
