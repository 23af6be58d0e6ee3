"""One model of every mixer, written as a researcher would: PyTorch, and the functions and a layer that transformers offers for import.

It knows nothing of us. Every layer is found in its own way: attention with and without a window, convolutions and token shifts by matchers,
the state space, the delta rule, the linear recurrence and the experts by seams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import RecurrentGemmaConfig
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as delta_rule
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

VOCABULARY, WIDTH, HEADS, HEAD = 96, 32, 4, 8
WINDOW = 12


class Attention(nn.Module):
    """Causal softmax attention, over the last `window` tokens if there is a window."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = None
        if self.window is not None:
            distance = places[0, :, None] - places[0, None, :]
            mask = (distance >= 0) & (distance < self.window)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


class StateSpace(nn.Module):
    """Mamba-2: a convolution of four taps, then SSD with grouped B and C."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(WIDTH, 2 * WIDTH + 2 * HEAD + HEADS), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH + 2 * HEAD, WIDTH + 2 * HEAD, 4, groups=WIDTH + 2 * HEAD, padding=3)
        self.rate, self.through, self.bias = (nn.Parameter(torch.randn(HEADS)) for _ in range(3))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        gate, mixed, dt = self.inside(x).split((WIDTH, WIDTH + 2 * HEAD, HEADS), -1)
        mixed = F.silu(self.conv(mixed.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        inner, b, c = mixed.split((WIDTH, HEAD, HEAD), -1)
        y = mamba2_chunk_scan(
            *(inner.unflatten(-1, (HEADS, HEAD)), dt, -self.rate.exp(), b.unsqueeze(2), c.unsqueeze(2)),
            **{"chunk_size": 16, "D": self.through, "dt_bias": self.bias, "dt_softplus": True},
        )
        return self.out(y.flatten(2) * F.silu(gate))


class DeltaRule(nn.Module):
    """Gated DeltaNet without its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gates, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD)) for part in self.qkv(x).chunk(3, -1))
        decay, beta = self.gates(x).chunk(2, -1)
        mixed, _ = delta_rule(q, k, v, g=-F.softplus(decay), beta=beta.sigmoid(), use_qk_l2norm_in_kernel=True)
        return self.out(mixed.flatten(2))


class Recurrence(nn.Module):
    """RG-LRU, the library's own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scan = RecurrentGemmaRglru(RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=HEADS))
        for parameter in self.scan.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        self.scan.recurrent_states = None
        return self.scan(x, places)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HEAD, bias=False), nn.Linear(WIDTH, HEAD, bias=False)
        self.down = nn.Linear(HEAD, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Each token goes through two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            row, choice = torch.where(chosen == index)
            out.index_add_(0, row, expert(flat[row]) * weights[row, choice, None])
        return out.reshape(x.shape)


class Shifted(nn.Module):
    """Experts that see half of the channels a token late."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.rand(WIDTH))
        self.inner = Experts()

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.inner(x + self.share * (F.pad(x, (0, 0, 1, -1)) - x))


class Hybrid(nn.Module):
    """Logits [B, S, V] of ids [B, S]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.mixers = nn.ModuleList([StateSpace(), Attention(), DeltaRule(), Shifted(), Recurrence(), Attention(WINDOW)])
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.mixers)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), position_ids)
        return 3 * self.head(x)


OPS = {
    "mixers.0": ["ad_conv::causal_conv1d", "ad_mamba::ssd"],
    "mixers.1": ["ad_attention::attention"],
    "mixers.2": ["ad_deltanet::gated_delta"],
    "mixers.3": ["ad_rnn::token_shift", "ad_moe::moe"],
    "mixers.4": ["ad_rnn::rg_lru"],
    "mixers.5": ["ad_attention::attention"],
}
"""By layer, what has to be found there."""


def model() -> Hybrid:
    """The same random weights at every call."""
    torch.manual_seed(5)
    return Hybrid().eval().requires_grad_(False)
