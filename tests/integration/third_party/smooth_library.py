"""Somebody's model, in a library that knows nothing of us: moving averages, written as a loop over time, between attention layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, LONGEST = 96, 32, 4, 128


class Smooth(nn.Module):
    """y_t = decay * y_(t-1) + (1 - decay) * x_t, a channel each."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decay, state, out = torch.sigmoid(self.rate), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = decay * state + (1 - decay) * x[:, t]
            out.append(state)
        return torch.stack(out, 1)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Hybrid(nn.Module):
    """Logits of ids; it learns the order of tokens from its averages alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.mixers = nn.ModuleList([Smooth(), Attend(), Smooth(), Attend()])
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.mixers)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)


def model() -> Hybrid:
    torch.manual_seed(3)
    return Hybrid().eval().requires_grad_(False)
