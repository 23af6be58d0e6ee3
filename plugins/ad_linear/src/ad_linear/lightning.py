"""Linear attention with a fixed decay a head: the canonical op, and the chunked algorithm that it shares with the torch kernel.

Per head, with a state S [K, V] and a decay a = exp(log_decay):

    S_t = a S_{t-1} + k_t v_t^T          o_t = scale * q_t^T S_t

as in lightning attention (Qin et al., "Various Lengths, Constant Speed", 2024) and retention (Sun et al., "Retentive Network", 2023).
N batch, H heads, S tokens, C tokens of a chunk, K key size, V value size.
"""

from __future__ import annotations

import torch

from ad_core.api import Role
from ad_core.graph.ops import define_op

CHUNK = 64

SCHEMA = "ad_linear::lightning(Tensor query, Tensor key, Tensor value, Tensor log_decay, *, float scale=1.0) -> Tensor"

ROLES = {
    **dict.fromkeys(("query", "key", "value"), Role.TOKEN),
    "log_decay": Role.PARAM,
    "scale": Role.CONST,
}


def lightning_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, *, scale: float = 1.0
) -> torch.Tensor:
    """query, key [B, S, H, K], value [B, S, H, V], log_decay [H] (at most 0) -> [B, S, H, V], contiguous.

    Half precision is computed in float32; the result has the dtype of `value`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, width = value.shape
    state = value.new_zeros((batch, heads, key.shape[3], width), dtype=dtype)
    query, key, values = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    output, _ = decayed_attention(query * scale, key, values, log_decay.to(dtype), state)
    return value.new_empty(value.shape).copy_(output.transpose(1, 2))


def decayed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (scaled), key [N, H, S, K], value [N, H, S, V], log_decay [H], state [N, H, K, V], all of one dtype
    -> (output [N, H, S, V], the state after the last token). Writes to none of them."""
    place = torch.arange(1, min(CHUNK, value.shape[2]) + 1, device=key.device, dtype=key.dtype)
    since_start = torch.exp(log_decay[:, None] * place)[..., None]  # [H, C, 1]
    apart = (place[:, None] - place).clamp_(min=0)
    pairs = torch.exp(log_decay[:, None, None] * apart).tril_()  # [H, C, C]
    output = value.new_empty(value.shape)
    for start in range(0, value.shape[2], CHUNK):
        q, k, v = (x[:, :, start : start + CHUNK] for x in (query, key, value))
        size = v.shape[2]  # the last chunk may be shorter
        scores = (q @ k.transpose(2, 3)) * pairs[:, :size, :size]
        output[:, :, start : start + CHUNK] = scores @ v + (q * since_start[:, :size]) @ state
        to_end = torch.exp(log_decay[:, None] * (size - place[:size]))[..., None]
        state = state * since_start[:, size - 1, :, None] + (k * to_end).transpose(2, 3) @ v
    return output, state


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, H, V], contiguous, of value's dtype."""
    return value.new_empty(value.shape)


lightning = define_op(SCHEMA, lightning_reference, _fake)
