"""mLSTM, the matrix memory of xLSTM: the canonical op, and the chunked algorithm that it shares with the torch kernel.

Per head, with a memory C [K, V], a normaliser n [K] and the stabiliser m, all zero at the start (Beck et al., "xLSTM", 2024):

    m_t = max(logsigmoid(f_t) + m_{t-1}, i_t)
    C_t = exp(logsigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T          n_t likewise with k_t
    h_t = scale * C_t^T q_t / (max(|scale * n_t . q_t|, exp(-m_t)) + eps)

The normaliser is what the memory would be of a value of 1, so it is kept as one more column of it.
N batch, H heads, S tokens, C tokens of a chunk, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ad_core.api import Role
from ad_core.graph.ops import define_op

CHUNK = 64

SCHEMA = (
    "ad_linear::mlstm(Tensor query, Tensor key, Tensor value, Tensor input_gate, Tensor forget_gate, *, "
    "float scale, float eps=1e-6) -> Tensor"
)

ROLES = {
    **dict.fromkeys(("query", "key", "value", "input_gate", "forget_gate"), Role.TOKEN),
    **dict.fromkeys(("scale", "eps"), Role.CONST),
}


def mlstm_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    *,
    scale: float,
    eps: float = 1e-6,
) -> torch.Tensor:
    """query, key [B, S, H, K], value [B, S, H, V], gates before their activation [B, S, H] -> [B, S, H, V], contiguous.

    Half precision is computed in float32; the result has the dtype of `value`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, _, heads, width = value.shape
    memory = value.new_zeros((batch, heads, key.shape[3], width + 1), dtype=dtype)
    peak = value.new_zeros((batch, heads), dtype=dtype)
    query, key, values, input_gate, forget_gate = (x.to(dtype).transpose(1, 2) for x in (query, key, value, input_gate, forget_gate))
    output, _, _ = matrix_memory(query * scale, key, values, input_gate, F.logsigmoid(forget_gate), memory, peak, eps)
    return value.new_empty(value.shape).copy_(output.transpose(1, 2))


def matrix_memory(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    log_forget: torch.Tensor,
    memory: torch.Tensor,
    peak: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query (scaled), key [N, H, S, K], value [N, H, S, V], input_gate, log_forget [N, H, S], memory [N, H, K, V + 1] with the
    normaliser last, peak (the stabiliser) [N, H], all of one dtype -> (output [N, H, S, V], memory and peak after the last token).
    Writes to none of them."""
    outputs = []
    for start in range(0, value.shape[2], CHUNK):
        q, k, v, gate, forget = (x[:, :, start : start + CHUNK] for x in (query, key, value, input_gate, log_forget))
        v = F.pad(v, (0, 1), value=1.0)  # the normaliser's value
        # [N, H, C], in float64: a small difference of two large sums is a decay close to 1.
        total, before = forget.cumsum(2, dtype=torch.float64), peak.double()
        # Everything relative to the decay since the chunk's start: what token j wrote has weight exp(source_j - best_i) at token i,
        # what was there before exp(peak - best_i), and of the largest of these weights the exponent is zero.
        source = gate - total
        best = torch.maximum(source.cummax(2).values, before[..., None])
        weights = _exp((source[:, :, None] - best[..., None]).clamp_(max=0), k).tril_()  # [N, H, i, j]
        read = ((q @ k.transpose(2, 3)) * weights) @ v + (q @ memory) * _exp(before[..., None] - best, k)[..., None]
        bound = torch.maximum(read[..., -1:].abs(), _exp(-(total + best), k)[..., None])
        outputs.append(read[..., :-1] / (bound + eps))
        last = best[..., -1:]
        written = (k * _exp(source - last, k)[..., None]).transpose(2, 3) @ v
        memory = memory * _exp(before[..., None] - last, k)[..., None] + written
        peak = (total[..., -1] + last[..., 0]).to(k.dtype)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)), memory, peak


def _exp(exponents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return exponents.to(like.dtype).exp_()


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, H, V], contiguous, of value's dtype."""
    return value.new_empty(value.shape)


mlstm = define_op(SCHEMA, mlstm_reference, _fake)
