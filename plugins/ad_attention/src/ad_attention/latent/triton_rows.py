"""Absorbed latent attention in one kernel: what all heads share is read once for all of them, after FlashMLA (DeepSeek-AI, 2025).

A row of a pool is R latent features and P rope features. Queries come multiplied by their head's up-projection, so keys of all heads
are that row and values its latent part: a tile of rows is loaded once and serves both products. M = rows of a program: BLOCK_Q tokens
of one sequence times PACK heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_attention.kernels.triton_ops import LOG2E, decode_row, dot, first_key, key_splits, sequence_of, slots_of, soften


@triton.jit
def attend_rows(
    q_latent,  # [M, R]
    q_rope,  # [M, P]
    row_max,  # [M] float32, log2 units
    row_sum,  # [M] float32: sum of weights relative to row_max
    begin,  # first key, a multiple of BLOCK_N
    end,  # one past the last key
    load_first,  # keys before it may lie in freed pages: not even loaded
    load_last,  # a list of keys may have later ones: not loaded either
    positions,  # [M]: the row's place in its sequence, -1 for a row of padding
    page_row,  # page_table[b]
    chosen,  # the one token's list of keys, which begin and end then count, or None
    latent_pages,  # [pages, PAGE_SIZE, R + P]
    scale,  # in log2 units
    WINDOW: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the keys [begin, end): (sum of weight * latent [M, R], new row_max, new row_sum)."""
    acc = tl.zeros([q_latent.shape[0], BLOCK_R], tl.float32)
    r = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    for start in tl.range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # Masked where loaded, not only where scored: what lies outside was perhaps never written, and 0 * NaN is NaN.
        if chosen is not None:
            n = tl.load(chosen + n, mask=n < end, other=-1).to(tl.int32)
            there = (n >= load_first) & (n <= load_last)
        else:
            there = (n >= load_first) & (n < end)
        rows = slots_of(page_row, n, there, PAGE_SIZE) * (R + P)
        latents = tl.load(latent_pages + rows[:, None] + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0)  # [N, R]
        ropes = tl.load(latent_pages + rows[None, :] + R + p[:, None], mask=there[None, :] & (p < P)[:, None], other=0.0)  # [P, N]
        latents = latents.to(q_latent.dtype)
        scores = dot(q_latent, tl.trans(latents), tl.zeros([q_latent.shape[0], BLOCK_N], tl.float32))
        scores = dot(q_rope, ropes.to(q_rope.dtype), scores) * scale
        seen = n[None, :] <= positions[:, None]
        if chosen is not None or WINDOW is not None:
            seen = seen & (n[None, :] >= first_key(positions, WINDOW, None)[:, None])
        weights, decay, row_max, row_sum = soften(tl.where(seen, scores, float("-inf")), row_max, row_sum)
        acc = dot(weights.to(q_latent.dtype), latents, acc * decay[:, None])
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "page_stride"])
def latent_kernel(
    output,  # [T, H, R], written if S is 1
    partial_output,  # [items, H, S, R] float32 or None
    partial_lse,  # [items, H, S] float32 or None: log2 of the sum of weights
    q_latent,  # [T, H, R], strides given
    q_rope,  # [T, H, P], strides given
    latent_pages,  # [pages, PAGE_SIZE, R + P]
    sinks,  # [H] or None
    selected,  # [T, CHOICES]: keys that a row sees, negative ones are none; or None
    cu_seqlens,  # [B + 1]
    context_lens,  # [B]
    page_table,  # [B, pages of a sequence]
    num_tokens,
    num_sequences,
    latent_stride_t,
    latent_stride_h,
    rope_stride_t,
    rope_stride_h,
    page_stride,
    scale,
    ITEMS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHOICES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid [items, cdiv(H, PACK), workers]. Worker w has splits w, w + workers, ...: each an attention of its own.

    ITEMS is one of `decode_row`'s (and BLOCK_Q 1), or "blocks": BLOCK_Q tokens of a sequence of several, cdiv(T, BLOCK_Q) + B items with
    S = 1, of which spare ones write the zeros of the rows past cu_seqlens[B]: there are exactly enough of them. A program without splits
    has no loop over them, which would cost it registers.
    """
    item = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    first_head = tl.program_id(1) * PACK
    member, token = (m, m * 0) if BLOCK_Q == 1 else (m % PACK, m // PACK)
    tl.static_assert(BLOCK_Q == 1 or PACK == H)  # so that a program's rows of [T, H] follow each other
    if ITEMS == "blocks":
        sequence = sequence_of(cu_seqlens, num_sequences, item, BLOCK_Q)
        if sequence == num_sequences:
            rows = (item - num_sequences) * BLOCK_Q + token
            padding = (m < BLOCK_Q * PACK) & (first_head + member < H) & (rows >= tl.load(cu_seqlens + num_sequences)) & (rows < num_tokens)
            places = output + ((rows.to(tl.int64) * H + first_head + member) * R)[:, None] + r[None, :]
            tl.store(places, tl.zeros([BLOCK_M, BLOCK_R], output.dtype.element_ty), mask=padding[:, None] & (r < R)[None, :])
            return
        origin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - origin
        first_token = (item - origin // BLOCK_Q - sequence) * BLOCK_Q
        if (length == 1) | (first_token >= length):
            return
        row = origin + first_token
        tokens = tl.minimum(length - first_token, BLOCK_Q)
        first_position = tl.load(context_lens + sequence) + first_token
        last_position = first_position + tokens - 1
    else:
        row, sequence, last_position = decode_row(cu_seqlens, context_lens, num_sequences, item, ITEMS)
        if row < 0:
            return
        tokens = 1
        first_position = last_position
    live = m < tokens * (PACK if H % PACK == 0 else tl.minimum(PACK, H - first_head))
    positions = first_position + token
    first, last, split_length, count = key_splits(first_position, last_position, WINDOW, None, CHOICES, S, MIN_SPLIT, BLOCK_N)
    if tl.program_id(2) >= tl.maximum(count, 1):
        return

    heads = (first_head + member).to(tl.int64)
    rows = row.to(tl.int64) + token
    p = tl.arange(0, BLOCK_P)
    by_latent = q_latent + (rows * latent_stride_t + heads * latent_stride_h)[:, None] + r[None, :]
    by_rope = q_rope + (rows * rope_stride_t + heads * rope_stride_h)[:, None] + p[None, :]
    query = tl.load(by_latent, mask=live[:, None] & (r < R)[None, :], other=0.0)
    rope = tl.load(by_rope, mask=live[:, None] & (p < P)[None, :], other=0.0)
    page_row = page_table + sequence.to(tl.int64) * page_stride
    chosen = None if selected is None else selected + row.to(tl.int64) * CHOICES

    first_seen = first_key(first_position, WINDOW, None)
    stored = live[:, None] & (r < R)[None, :]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if S == 1:
        if sinks is not None:
            row_max = tl.load(sinks + heads, mask=live, other=0.0).to(tl.float32) * LOG2E
            row_sum += 1.0
        acc, row_max, row_sum = attend_rows(
            query, rope, row_max, row_sum, first, last, first_seen, last_position, positions, page_row, chosen, latent_pages,
            scale, WINDOW, PAGE_SIZE, R, P, BLOCK_R, BLOCK_P, BLOCK_N,
        )  # fmt: skip
        result = acc * (1.0 / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
        place = output + (row.to(tl.int64) * H + first_head) * R
        tl.store(place + m[:, None] * R + r[None, :], result.to(output.dtype.element_ty), mask=stored)
    else:
        for split in range(tl.program_id(2), count, tl.num_programs(2)):
            begin = first + split * split_length
            end = tl.minimum(begin + split_length, last)
            acc, split_max, split_sum = attend_rows(
                query, rope, row_max, row_sum, begin, end, first_seen, last_position, positions, page_row, chosen, latent_pages,
                scale, WINDOW, PAGE_SIZE, R, P, BLOCK_R, BLOCK_P, BLOCK_N,
            )  # fmt: skip
            result = acc * (1.0 / tl.where(split_sum > 0, split_sum, 1.0))[:, None]
            part = (item.to(tl.int64) * H + first_head) * S + split
            tl.store(partial_output + part * R + m[:, None] * (S * R) + r[None, :], result, mask=stored)
            tl.store(partial_lse + part + m * S, split_max + tl.log2(tl.where(split_sum > 0, split_sum, 1.0)), mask=live)
