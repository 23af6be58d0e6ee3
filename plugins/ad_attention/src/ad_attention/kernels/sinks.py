"""Softmax in which sinks take their share."""

from __future__ import annotations

import torch


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of scores [n, H, L] over L; `sinks` [H] are one more score of every row, and what they get is left out."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).view(1, -1, 1).expand(scores.shape[0], -1, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
