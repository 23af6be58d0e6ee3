"""The delta rule over many tokens at once, in chunks. What the canonical ops and the torch kernel both compute with.

Per head, with a state S [K, V], decay a_t (a number, or one for each row of S), step size b_t:

    S_t = diag(a_t) S_{t-1} + b_t k_t (v_t - k_t^T diag(a_t) S_{t-1})^T          o_t = q_t^T S_t

Inside a chunk the corrections b_t (v_t - ...) of all tokens solve one triangular system (the WY form of Yang et al., "Parallelizing
Linear Transformers with the Delta Rule over Sequence Length", 2024, with decays as in "Gated Delta Networks", 2024, and
"Kimi Linear", 2025), so that only the state has to go from chunk to chunk.

Letters: N batch x heads, S tokens, C tokens of a chunk, n chunks, K key size, V value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK = 64
BLOCK = 8
"""Tokens whose decays by channel are compared pair by pair; between blocks they go by way of the later block's start."""
SEGMENT = 1024
"""Tokens whose chunks are worked out side by side: bounds the memory of long prompts."""


def delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (scaled), key [N, S, K], value [N, S, V], log_decay [N, S, 1] or [N, S, K] or None, beta [N, S, 1], state [N, K, V], all of
    one dtype -> (output [N, S, V], the state after the last token). Writes to none of them."""
    outputs = []
    for start in range(0, query.shape[1], SEGMENT):
        part = slice(start, start + SEGMENT)
        decay = None if log_decay is None else log_decay[:, part]
        output, state = _segment(query[:, part], key[:, part], value[:, part], decay, beta[:, part], state)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), state


def _segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    length, width = query.shape[1], value.shape[2]
    query, key, value, beta = (_in_chunks(x) for x in (query, key, value, beta))  # [N, n, C, ...]
    steps = key * beta
    if log_decay is None:
        reading, erasing, writing, whole = query, steps, key, None
        transposed = key.transpose(2, 3)
        overlap, scores = steps @ transposed, query @ transposed
    else:
        # Of the chunk's tokens up to and with this one. In float64: a small difference of two large sums is a decay close to 1.
        total = _in_chunks(log_decay).cumsum(2, dtype=torch.float64)
        pairs = _pairs_by_head if total.shape[3] == 1 else _pairs_by_channel
        overlap, scores = pairs(query, key, steps, total)
        since_start, to_end = _exp(total, key), _exp(total[:, :, -1:] - total, key)
        reading, erasing, writing, whole = query * since_start, steps * since_start, key * to_end, since_start[:, :, -1, :, None]
    # The solver reads what lies below the diagonal, and takes that for ones.
    right = torch.cat([value * beta, erasing], 3)
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    fresh, erasing = solved.split((width, key.shape[3]), 3)
    scores = scores.tril_()
    outputs = torch.empty_like(fresh)
    for chunk in range(query.shape[1]):
        corrections = torch.baddbmm(fresh[:, chunk], erasing[:, chunk], state, alpha=-1)
        torch.baddbmm(reading[:, chunk] @ state, scores[:, chunk], corrections, out=outputs[:, chunk])
        kept = state if whole is None else state * whole[:, chunk]
        state = torch.baddbmm(kept, writing[:, chunk].transpose(1, 2), corrections)
    return outputs.flatten(1, 2)[:, :length], state


def _in_chunks(x: torch.Tensor) -> torch.Tensor:
    """[N, S, ...] as [N, n, C, ...]. What is missing in the last chunk is zero, and a token of zeros changes nothing.

    A short sequence is one chunk of whole blocks.
    """
    length = x.shape[1]
    size = min(CHUNK, -(-length // BLOCK) * BLOCK)
    missing = -length % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (-1, size))


def _exp(exponents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return exponents.to(like.dtype).exp()


def _pairs_by_head(query: torch.Tensor, key: torch.Tensor, steps: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(steps_i . key_j, query_i . key_j) [N, n, C, C], decayed from j to i; what lies above the diagonal means nothing."""
    decay = _exp((total - total.transpose(2, 3)).clamp_(max=0), key)
    transposed = key.transpose(2, 3)
    return (steps @ transposed).mul_(decay), (query @ transposed).mul_(decay)


def _pairs_by_channel(
    query: torch.Tensor, key: torch.Tensor, steps: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with a decay for each channel, which no product of two matrices gives. No exponent is ever positive:

    exp(total_i - total_j) is taken pair by pair inside a block, and is exp(total_i - start) * exp(start - total_j) for a j before
    the block of i, whose total before its first token is `start`.
    """
    size, blocks = key.shape[2], key.shape[2] // BLOCK
    left = torch.stack([steps, query], 3)  # [N, n, C, 2, K]
    pairs = key.new_zeros(*key.shape[:3], 2, size)  # [N, n, C, 2, C]
    inner = total.unflatten(2, (blocks, BLOCK))
    inner = (inner - inner[:, :, :, :1]).to(key.dtype)
    decayed = (inner[:, :, :, :, None] - inner[:, :, :, None]).clamp_(max=0).exp_()  # [N, n, blocks, i, j, K]
    decayed.mul_(key.unflatten(2, (blocks, BLOCK))[:, :, :, None])
    inside = left.unflatten(2, (blocks, BLOCK)) @ decayed.transpose(4, 5)  # [N, n, blocks, i, 2, j]
    for block in range(blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        pairs[:, :, rows, :, rows] = inside[:, :, block]
        if block:
            start = total[:, :, rows.start - 1 : rows.start]
            before = key[:, :, : rows.start] * _exp(start - total[:, :, : rows.start], key)
            reading = left[:, :, rows] * _exp(total[:, :, rows] - start, key)[:, :, :, None]
            pairs[:, :, rows, :, : rows.start] = (reading.flatten(2, 3) @ before.transpose(2, 3)).unflatten(2, (BLOCK, 2))
    overlap, scores = pairs.unbind(3)
    return overlap.contiguous(), scores.contiguous()
