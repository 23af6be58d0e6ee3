"""Both recurrences as they are written in the papers: one token after the other."""

from __future__ import annotations

import torch


def lightning(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, scale: float, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical op's arguments, and a state [B, H, K, V] -> (output, last state)."""
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3]) if state is None else state
    outputs = []
    for t in range(value.shape[1]):
        state = state * log_decay.exp()[:, None, None] + torch.einsum("bhk,bhv->bhkv", key[:, t], value[:, t])
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(outputs, 1), state


def mlstm(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    scale: float,
    eps: float = 1e-6,
) -> torch.Tensor:
    """The canonical op's arguments -> output."""
    batch, length, heads, width = value.shape
    memory, norm, peak = value.new_zeros(batch, heads, key.shape[3], width), torch.zeros_like(key[:, 0]), value.new_zeros(batch, heads)
    outputs = []
    for t in range(length):
        kept = torch.log(torch.sigmoid(forget_gate[:, t])) + peak
        peak = torch.maximum(kept, input_gate[:, t])
        forget, write = (kept - peak).exp()[..., None], (input_gate[:, t] - peak).exp()[..., None]
        memory = forget[..., None] * memory + torch.einsum("bhk,bhv->bhkv", write * key[:, t], value[:, t])
        norm = forget * norm + write * key[:, t]
        read = scale * torch.einsum("bhk,bhkv->bhv", query[:, t], memory)
        size = scale * (norm * query[:, t]).sum(-1)
        outputs.append(read / (torch.maximum(size.abs(), (-peak).exp()) + eps)[..., None])
    return torch.stack(outputs, 1)
