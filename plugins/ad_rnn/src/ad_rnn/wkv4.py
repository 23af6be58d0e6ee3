"""RWKV-4's weighted sum over the past: the canonical op, and the scan that it shares with the torch kernel.

By channel, with w = -exp(time_decay) and u = time_first (Peng et al., "RWKV", 2023):

    out_t = (sum_{j<t} exp((t-1-j) w + k_j) v_j + exp(u + k_t) v_t) / (the same sums without v)

Both sums are kept relative to exp(peak), so that no exponent is ever positive. N batch, S tokens, D channels.
"""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op

SCHEMA = "ad_rnn::wkv4(Tensor key, Tensor value, Tensor time_decay, Tensor time_first) -> Tensor"
ROLES = {"key": Role.TOKEN, "value": Role.TOKEN, "time_decay": Role.PARAM, "time_first": Role.PARAM}

NO_PEAK = -1e38
"""The peak before the first token: less than any key, and a number still after many decays."""


def wkv4_reference(key: torch.Tensor, value: torch.Tensor, time_decay: torch.Tensor, time_first: torch.Tensor) -> torch.Tensor:
    """key, value [B, S, D], time_decay, time_first [D] -> [B, S, D], contiguous, of value's dtype. Half precision is summed in float32."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    output, _ = weighted_sums(
        key.to(dtype), value.to(dtype), -torch.exp(time_decay.to(dtype)), time_first.to(dtype), first_state(value[:, 0], dtype)
    )
    return value.new_empty(value.shape).copy_(output)


def first_state(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The state [N, 3, D] before the first token, for `like` [N, D]."""
    state = like.new_zeros(like.shape[0], 3, like.shape[1], dtype=dtype)
    state[:, 2] = NO_PEAK
    return state


def weighted_sums(
    key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, bonus: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """key, value [N, S, D], log_decay, bonus [D], state [N, 3, D] (sum of values, of weights, their peak), all of one dtype
    -> (output [N, S, D], the state after the last token). Writes to none of them.

    Spans of 1, 2, 4 ... tokens are joined to the span before them; there is no loop over tokens.
    """
    length = key.shape[1]
    past = torch.stack([value, torch.ones_like(value), key], 2)  # [N, S, 3, D]: each token alone
    span = 1
    while span < length:
        past[:, span:] = joined(past[:, :-span], span * log_decay, past[:, span:])
        span *= 2
    ages = torch.arange(1, length + 1, device=key.device, dtype=key.dtype)[:, None] * log_decay  # [S, D]
    past = joined(state[:, None], ages, past)
    before = torch.cat([state[:, None], past[:, :-1]], 1)
    return read(before, key, value, bonus), past[:, -1]


def joined(left: torch.Tensor, log_decay: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Two neighbouring spans [..., 3, D] as one; the left one decays by exp(log_decay) while the right one passes."""
    aged = left[..., 2, :] + log_decay
    peak = torch.maximum(aged, right[..., 2, :])
    weights = torch.exp(aged - peak)[..., None, :] * left[..., :2, :] + torch.exp(right[..., 2, :] - peak)[..., None, :] * right[..., :2, :]
    return torch.cat([weights, peak[..., None, :]], -2)


def read(before: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """The output at a token [..., D], given the state before it [..., 3, D]."""
    total, weight, past = before.unbind(-2)
    own = key + bonus
    peak = torch.maximum(past, own)
    old, new = torch.exp(past - peak), torch.exp(own - peak)
    return (old * total + new * value) / (old * weight + new)


def _fake(key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


wkv4 = define_op(SCHEMA, wkv4_reference, _fake)
