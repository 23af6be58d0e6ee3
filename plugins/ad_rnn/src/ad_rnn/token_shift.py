"""Each token's predecessor: the canonical op."""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op

SCHEMA = "ad_rnn::token_shift(Tensor x) -> Tensor"
ROLES = {"x": Role.TOKEN}


def token_shift_reference(x: torch.Tensor) -> torch.Tensor:
    """x [B, S, D] -> [B, S, D], contiguous: row t holds x at t - 1, row 0 zeros."""
    out = x.new_zeros(x.shape)
    out[:, 1:] = x[:, :-1]
    return out


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


token_shift = define_op(SCHEMA, token_shift_reference, _fake)
