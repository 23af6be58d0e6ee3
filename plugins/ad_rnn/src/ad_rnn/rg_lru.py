"""A linear recurrence by channel: the canonical op, and the scan that it shares with the torch kernel.

    h_t = gate_t * h_{t-1} + x_t

which is what is left of an RG-LRU (De et al., "Griffin", 2024) once its gates, which look at one token alone, are computed.
N batch, S tokens, D channels.
"""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op

SCHEMA = "ad_rnn::rg_lru(Tensor x, Tensor gate) -> Tensor"
ROLES = {"x": Role.TOKEN, "gate": Role.TOKEN}


def rg_lru_reference(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x, gate [B, S, D] -> [B, S, D], contiguous, of x's dtype. Half precision is summed in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    states = scan(x.to(dtype), gate.to(dtype), x.new_zeros(x.shape[0], x.shape[2], dtype=dtype))
    return x.new_empty(x.shape).copy_(states)


def scan(x: torch.Tensor, gate: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """x, gate [N, S, D], state [N, D], of one dtype -> the state after every token, [N, S, D]. Writes to none of them.

    Spans of 1, 2, 4 ... tokens are joined to the span before them (Hillis and Steele, "Data Parallel Algorithms", 1986): there is no
    loop over tokens, and nothing is ever divided by a gate.
    """
    states, reach = x.clone(), gate.clone()
    states[:, 0].addcmul_(gate[:, 0], state)
    span, length = 1, x.shape[1]
    while span < length:
        states[:, span:] = torch.addcmul(states[:, span:], reach[:, span:], states[:, :-span])
        if 2 * span < length:
            reach[:, span:] = reach[:, span:] * reach[:, :-span]
        span *= 2
    return states


def _fake(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


rg_lru = define_op(SCHEMA, rg_lru_reference, _fake)
