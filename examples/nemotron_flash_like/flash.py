"""A hybrid language model as a researcher writes it: PyTorch, and the kernels of fla and mamba_ssm where they are installed.

Pairs of a mixer (gated DeltaNet, Mamba-2 or attention) and a feed-forward, and meta tokens: learned vectors in the place of the first
tokens of every sequence. It knows nothing of any engine. The one convention is that of transformers: `forward(input_ids,
position_ids=None)` gives logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
except ImportError:

    def chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=False):
        """S_t = e^g_t S_(t-1) + beta_t k_t (v_t - k_t^T e^g_t S_(t-1))^T, o_t = q_t^T S_t / sqrt(K); q, k and v are [B, S, H, .],
        g and beta [B, S, H]."""
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        state, out = q.new_zeros(*q[:, 0].shape, v.shape[-1]), []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            delta = (v[:, t] - (k[:, t, :, None] @ state)[:, :, 0]) * beta[:, t, :, None]
            state = state + k[:, t, :, :, None] * delta[:, :, None]
            out.append((q[:, t, :, None] @ state)[:, :, 0] * q.shape[-1] ** -0.5)
        return torch.stack(out, 1), None


try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_softplus=False):
        """S_t = e^(d_t A) S_(t-1) + d_t x_t B_t^T, y_t = S_t C_t + D x_t; x is [B, S, H, P], dt [B, S, H], B and C [B, S, G, N]."""
        dt = F.softplus(dt + dt_bias) if dt_softplus else dt + dt_bias
        B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], 2) for part in (B, C))
        state, out = x.new_zeros(*x[:, 0].shape, B.shape[-1]), []
        for t in range(x.shape[1]):
            state = state * (dt[:, t] * A).exp()[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            out.append((state @ C[:, t, :, :, None])[..., 0] + D[:, None] * x[:, t])
        return torch.stack(out, 1)


class ShortConv(nn.Conv1d):
    """A causal convolution of four taps a channel, with SiLU: [B, S, C] -> [B, S, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 4, groups=channels, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class DeltaNet(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.conv = nn.Linear(width, 3 * width, bias=False), ShortConv(3 * width)
        self.gates, self.gate, self.out = nn.Linear(width, 2 * heads), nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.rate, self.norm = nn.Parameter(torch.rand(heads)), nn.RMSNorm(width // heads)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.conv(self.qkv(x)).chunk(3, -1))
        decay, beta = self.gates(x).chunk(2, -1)
        g = -self.rate.exp() * F.softplus(decay)
        y, _ = chunk_gated_delta_rule(q, k, v, g, beta.sigmoid(), use_qk_l2norm_in_kernel=True)
        return self.out(self.norm(y).flatten(2) * F.silu(self.gate(x)))


class Mamba2(nn.Module):
    def __init__(self, width: int, heads: int, state: int = 16) -> None:
        super().__init__()
        self.heads, self.sizes = heads, (2 * width, state, state)
        self.inside, self.gate = nn.Linear(width, sum(self.sizes) + heads, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.conv, self.out = ShortConv(sum(self.sizes)), nn.Linear(2 * width, width, bias=False)
        self.rate, self.skip, self.bias = (nn.Parameter(torch.rand(heads)) for _ in range(3))
        self.norm = nn.RMSNorm(2 * width)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mixed, dt = self.inside(x).split((sum(self.sizes), self.heads), -1)
        inner, b, c = self.conv(mixed).split(self.sizes, -1)
        y = mamba_chunk_scan_combined(
            inner.unflatten(-1, (self.heads, -1)),
            dt,
            -self.rate.exp(),
            b[:, :, None],
            c[:, :, None],
            chunk_size=128,
            D=self.skip,
            dt_bias=self.bias,
            dt_softplus=True,
        )
        return self.out(self.norm(y.flatten(2) * F.silu(self.gate(x))))


class Attention(nn.Module):
    """Grouped heads with rotary positions."""

    def __init__(self, width: int, heads: int, groups: int = 2) -> None:
        super().__init__()
        self.size, self.groups = width // heads, heads // groups
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width // self.groups, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (turned(part, positions) for part in (q, k))
        k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x is [B, H, S, D], positions [B, S]."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


MIXERS = {"deltanet": DeltaNet, "mamba2": Mamba2, "attention": Attention}
_FOUR = ("deltanet", "mamba2", "attention", "mamba2")
PATTERN = (*_FOUR, *_FOUR, *_FOUR, "deltanet", "mamba2", "deltanet", "mamba2", "deltanet", "mamba2")
"""The mixers of the 18 pairs of a 3B model, whose width is 3072."""


class Block(nn.Module):
    def __init__(self, kind: str, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.mixer, self.feed = MIXERS[kind](width, heads), FeedForward(width)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm1(x), positions)
        return x + self.feed(self.norm2(x))


class Flash(nn.Module):
    """Logits [B, S, V] of ids [B, S]. The first `num_meta` ids of a sequence are placeholders: meta tokens stand there."""

    def __init__(self, vocabulary: int = 256, width: int = 64, heads: int = 4, num_meta: int = 8, pattern: Sequence[str] = PATTERN) -> None:
        super().__init__()
        self.num_meta = num_meta
        self.tokens, self.meta = nn.Embedding(vocabulary, width), nn.Embedding(num_meta, width)
        self.blocks = nn.ModuleList(Block(kind, width, heads) for kind in pattern)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        meta = self.meta(position_ids.clamp(max=self.num_meta - 1))
        x = torch.where(position_ids[..., None] < self.num_meta, meta, self.tokens(input_ids))
        for block in self.blocks:
            x = block(x, position_ids)
        return self.head(self.norm(x))
