"""The inner loop of both attention kernels: a block of query rows against a range of one sequence's paged keys.

M rows (query tokens x packed heads), N keys a tile, D head size, DV value head size, G key/value heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_attention.kernels.triton_ops import LOG2E, dot, first_key, load_tile, slots_of, soften, tanh


@triton.jit
def attend(
    q,  # [M, D]
    acc,  # [M, DV] float32: sum of weight * value, not normalised
    row_max,  # [M] float32: largest score so far, log2 units
    row_sum,  # [M] float32: sum of weights relative to row_max
    begin,  # first key, a multiple of BLOCK_N, so that tiles are the same in every step
    end,  # one past the last key
    load_first,  # keys before it may lie in freed pages: not even loaded
    load_last,  # a list of keys may have later ones: not loaded either
    positions,  # [M]: the row's place in its sequence, -1 for a row of padding
    heads,  # [M]: the row's query head, valid also for padding
    kv_head,
    page_row,  # page_table[b]
    chosen,  # the one token's list of keys, which begin and end then count, or None
    key_pages,  # [pages, PAGE_SIZE, G, D]
    value_pages,  # [pages, PAGE_SIZE, G, DV]
    key_bias_pages,  # [pages, PAGE_SIZE, G] or None
    alibi_slopes,  # [H] or None
    rel_bias,  # [H, DISTANCES] or None: bias by distance, the last entry for all further ones
    distance_bias,  # [T, H, EXTENT] or None: the query's own bias by distance, none further away
    own,  # [M] int64: the row's place in [T, H], valid where it is no padding
    scale,  # in log2 units
    softcap,  # in log2 units, or None
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    DISTANCES: tl.constexpr,
    EXTENT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the keys [begin, end); returns the new (acc, row_max, row_sum).

    MASKED False promises that every row sees every key of the range, and that the range is whole tiles.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for start in tl.range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # Masked where loaded, not only where scored: what lies outside was perhaps never written, and 0 * NaN is NaN.
        if chosen is not None:
            n = tl.load(chosen + n, mask=n < end, other=-1).to(tl.int32)
            there = (n >= load_first) & (n <= load_last)
        else:
            there = (n >= load_first) & (n < end)
        slots = slots_of(page_row, n, there, PAGE_SIZE)
        entries = slots * G + kv_head
        keys = load_tile(key_pages + entries[None, :] * D + d[:, None], there[None, :] & (d < D)[:, None], MASKED or BLOCK_D != D)  # [D, N]
        values = load_tile(
            value_pages + entries[:, None] * DV + dv[None, :], there[:, None] & (dv < DV)[None, :], MASKED or BLOCK_DV != DV
        )  # [N, DV]

        scores = dot(q, keys.to(q.dtype), tl.zeros([q.shape[0], BLOCK_N], tl.float32)) * scale
        if softcap is not None:
            scores = softcap * tanh(scores / softcap)
        if alibi_slopes is not None:
            slopes = tl.load(alibi_slopes + heads).to(tl.float32) * LOG2E
            scores += slopes[:, None] * (n[None, :] - positions[:, None]).to(tl.float32)
        if rel_bias is not None:
            distances = tl.minimum(tl.maximum(positions[:, None] - n[None, :], 0), DISTANCES - 1)
            scores += tl.load(rel_bias + heads[:, None] * DISTANCES + distances).to(tl.float32) * LOG2E
        if distance_bias is not None:
            back = positions[:, None] - n[None, :]
            near = (back >= 0) & (back < EXTENT)
            scores += tl.load(distance_bias + own[:, None] * EXTENT + back, mask=near, other=0.0).to(tl.float32) * LOG2E
        if key_bias_pages is not None:
            key_bias = load_tile(key_bias_pages + entries, there, MASKED)
            scores += key_bias.to(tl.float32)[None, :] * LOG2E
        if MASKED:
            seen = (n[None, :] <= positions[:, None]) & (n[None, :] >= first_key(positions, WINDOW, CHUNK)[:, None])
            scores = tl.where(seen, scores, float("-inf"))

        weights, decay, row_max, row_sum = soften(scores, row_max, row_sum)
        acc = dot(weights.to(q.dtype), values.to(q.dtype), acc * decay[:, None])
    return acc, row_max, row_sum
