"""The delta rule over many tokens at once, in chunks. What the canonical ops and the torch kernel both compute with.

Per head, with a state S [K, V], decay a_t (a number, or one for each row of S), step size b_t:

    S_t = diag(a_t) S_{t-1} + b_t k_t (v_t - k_t^T diag(a_t) S_{t-1})^T          o_t = q_t^T S_t

Inside a chunk the corrections b_t (v_t - ...) of all tokens solve one triangular system (the WY form of Yang et al., "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length", 2024, with decays as in "Gated Delta Networks", 2024, and
"Kimi Linear", 2025), so that only the state has to go from chunk to chunk.

Letters: N batch x heads, S tokens, C tokens of a chunk, K key size, V value size.
"""

from __future__ import annotations

import torch

CHUNK = 64
"""Also what stays in a processor's cache: chunks worked out side by side were half as fast."""
BLOCK = 8
"""Tokens whose decays by channel are compared pair by pair; between blocks they go by way of the later block's start."""


def delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (scaled), key [N, S, K], value [N, S, V], log_decay [N, S, 1] or [N, S, K] or None, beta [N, S, 1], state [N, K, V], all of
    one dtype -> (output [N, S, V], the state after the last token). Writes to none of them."""
    output = value.new_empty(value.shape)
    for start in range(0, value.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        decay = None if log_decay is None else log_decay[:, part]
        output[:, part], state = _chunk(query[:, part], key[:, part], value[:, part], decay, beta[:, part], state)
    return output, state


def _chunk(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    steps, kept = key * beta, state
    if log_decay is None:
        reading, erasing, writing = query, steps, key
        transposed = key.transpose(1, 2)
        overlap, scores = steps @ transposed, query @ transposed
    else:
        # Of the chunk's tokens up to and with this one. In float64: a small difference of two large sums is a decay close to 1.
        total = log_decay.cumsum(1, dtype=torch.float64)  # [N, C, 1 or K]
        pairs = _pairs_by_head if total.shape[2] == 1 else _pairs_by_channel
        overlap, scores = pairs(query, key, steps, total)
        since_start, to_end = _exp(total, key), _exp(total[:, -1:] - total, key)
        reading, erasing, writing = query * since_start, steps * since_start, key * to_end
        kept = state * since_start[:, -1, :, None]
    # The solver reads what lies below the diagonal, and takes that for ones.
    wanted = torch.baddbmm(value * beta, erasing, state, alpha=-1)
    corrections = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    output = torch.baddbmm(reading @ state, scores.tril_(), corrections)
    return output, torch.baddbmm(kept, writing.transpose(1, 2), corrections)


def _exp(exponents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return exponents.to(like.dtype).exp()


def _pairs_by_head(query: torch.Tensor, key: torch.Tensor, steps: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps_i . key_j, query_i . key_j) [N, C, C], decayed from j to i; what lies above the diagonal means nothing."""
    decay = _exp((total - total.transpose(1, 2)).clamp_(max=0), key)
    transposed = key.transpose(1, 2)
    return (steps @ transposed).mul_(decay), (query @ transposed).mul_(decay)


def _pairs_by_channel(
    query: torch.Tensor, key: torch.Tensor, steps: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with a decay for each channel, which no product of two matrices gives. No exponent is ever positive:

    exp(total_i - total_j) is taken pair by pair inside a block, and is exp(total_i - start) * exp(start - total_j) for a j before
    the block of i, whose total before its first token is `start`.
    """
    left = torch.stack([steps, query], 2)  # [N, C, 2, K]
    pairs = key.new_zeros(*left.shape[:3], key.shape[1])  # [N, C, 2, C]
    for begin in range(0, key.shape[1], BLOCK):
        rows = slice(begin, begin + BLOCK)
        start = total[:, begin - 1 : begin] if begin else torch.zeros_like(total[:, :1])
        inner = (total[:, rows] - start).to(key.dtype)
        decayed = (inner[:, :, None] - inner[:, None]).clamp_(max=0).exp_().mul_(key[:, None, rows])  # [N, i, j, K]
        pairs[:, rows, :, rows] = left[:, rows] @ decayed.transpose(2, 3)
        if begin:
            before = key[:, :begin] * _exp(start - total[:, :begin], key)
            reading = left[:, rows] * inner.exp()[:, :, None]
            pairs[:, rows, :, :begin] = (reading.flatten(1, 2) @ before.transpose(1, 2)).unflatten(1, (-1, 2))
    overlap, scores = pairs.unbind(2)
    return overlap.contiguous(), scores.contiguous()
