"""Linear attention with a fixed decay a head: the canonical op, and the chunked algorithm that it shares with the torch kernel.

Per head, with a state S [K, V] and a decay a = exp(log_decay):

    S_t = a S_{t-1} + k_t v_t^T          o_t = scale * q_t^T S_t

as in lightning attention (Qin et al., "Various Lengths, Constant Speed", 2024) and retention (Sun et al., "Retentive Network", 2023).
N batch, H heads, S tokens, C tokens of a chunk, n chunks, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
    length = value.shape[2]
    size = min(CHUNK, length)
    count = -(-length // size)
    last = length - (count - 1) * size
    query, key, value = (_in_chunks(x, count * size - length, size) for x in (query, key, value))

    place = torch.arange(1, size + 1, device=key.device, dtype=key.dtype)
    since_start = torch.exp(log_decay[:, None] * place)  # [H, C]
    apart = (place[:, None] - place).clamp_(min=0)
    scores = (query @ key.transpose(3, 4)).mul_(torch.exp(log_decay[:, None, None] * apart)[:, None]).tril_()
    output = scores @ value
    reading = query * since_start[:, None, :, None]
    for chunk in range(count):
        output[:, :, chunk] += reading[:, :, chunk] @ state
        tokens = last if chunk == count - 1 else size
        # Decay from each token to the end of the chunk: that of the last chunk is where its tokens end, not its padding.
        to_end = torch.exp(log_decay[:, None] * (tokens - place[:tokens]))[..., None]  # [H, tokens, 1]
        writing = (key[:, :, chunk, :tokens] * to_end).transpose(2, 3)
        state = state * since_start[:, tokens - 1, None, None] + writing @ value[:, :, chunk, :tokens]
    return output.flatten(2, 3)[:, :, :length], state


def _in_chunks(x: torch.Tensor, missing: int, size: int) -> torch.Tensor:
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, size))


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, H, V], contiguous, of value's dtype."""
    return value.new_empty(value.shape)


lightning = define_op(SCHEMA, lightning_reference, _fake)
