"""The delta rule as it is written in the papers: one token after the other."""

from __future__ import annotations

import torch


def recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    l2norm: bool = False,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments of the canonical ops, g with or without a channel dimension, and a state [B, Hv, K, V] -> (output, last state)."""
    batch, length, heads, width = value.shape
    group = heads // key.shape[2]
    if l2norm:
        query, key = (x / torch.sqrt((x**2).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, key = (x[:, :, torch.arange(heads) // group] for x in (query, key))
    state = value.new_zeros(batch, heads, key.shape[3], width) if state is None else state
    outputs = []
    for t in range(length):
        if g is not None:
            decay = g[:, t].exp()
            state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
        known = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * (value[:, t] - known))
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outputs, 1), state
