"""Both recurrences as they are written in the papers: one token after the other."""

from __future__ import annotations

import torch


def rg_lru(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    state, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = gate[:, t] * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1)


def wkv4(key: torch.Tensor, value: torch.Tensor, time_decay: torch.Tensor, time_first: torch.Tensor) -> torch.Tensor:
    """By the definition: a softmax over all earlier tokens by their age, and the token itself."""
    outputs = []
    for t in range(key.shape[1]):
        ages = torch.arange(t - 1, -1, -1, dtype=key.dtype)[:, None]
        scores = torch.cat([key[:, :t] - time_decay.exp() * ages, (key[:, t] + time_first)[:, None]], 1)
        outputs.append((scores.softmax(1) * value[:, : t + 1]).sum(1))
    return torch.stack(outputs, 1)
