"""Chunks of several tokens against paged keys: variable-length causal flash attention (Dao, 2023) in one kernel.

A block of rows is BLOCK_Q tokens of one sequence times the PACK query heads that share a key/value head, so that short
chunks of grouped-query models fill the matrix units too. Sequences of one token are left to the decode kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_attention.kernels.triton_ops import LOG2E, first_key, sequence_of
from ad_attention.kernels.triton_tile import attend


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "page_stride"])
def prefill_kernel(
    output,  # [T, H, DV]
    query,  # [T, H, D], strides given
    key_pages,
    value_pages,
    key_bias_pages,
    sinks,  # [H], with OWN_SINKS [T, H], or None
    alibi_slopes,
    rel_bias,
    distance_bias,
    cu_seqlens,  # [B + 1]
    context_lens,  # [B]
    page_table,  # [B, P]
    num_tokens,
    num_sequences,
    query_stride_t,
    query_stride_h,
    page_stride,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    DISTANCES: tl.constexpr,
    EXTENT: tl.constexpr,
    OWN_SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid [cdiv(T, BLOCK_Q) + B, G * head blocks]: an upper bound known from shapes. Spare programs write the zeros of
    the rows past cu_seqlens[B]: there are exactly enough of them."""
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    HEAD_BLOCKS: tl.constexpr = (H // G + PACK - 1) // PACK
    # Late blocks see the most keys: started first, they leave the short ones to fill the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    m = tl.arange(0, BLOCK_M)
    member = tl.program_id(1) % HEAD_BLOCKS * PACK + m % PACK
    head_live = (m < BLOCK_Q * PACK) & (member < H // G)
    heads = kv_head * (H // G) + tl.where(head_live, member, 0)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    sequence = sequence_of(cu_seqlens, num_sequences, block, BLOCK_Q)
    if sequence == num_sequences:
        rows = (block - num_sequences) * BLOCK_Q + m // PACK
        padding = head_live & (rows >= tl.load(cu_seqlens + num_sequences)) & (rows < num_tokens)
        places = (rows.to(tl.int64) * H + heads) * DV
        zeros = tl.zeros([BLOCK_M, BLOCK_DV], output.dtype.element_ty)
        tl.store(output + places[:, None] + dv[None, :], zeros, mask=padding[:, None] & (dv < DV)[None, :])
        return
    origin = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - origin
    first_token = (block - origin // BLOCK_Q - sequence) * BLOCK_Q
    if (length == 1) | (first_token >= length):
        return

    context = tl.load(context_lens + sequence)
    tokens = first_token + m // PACK
    live = head_live & (tokens < length)
    positions = tl.where(live, context + tokens, -1)
    rows = (origin + tokens).to(tl.int64)
    own = rows * H + heads
    q = tl.load(
        query + (rows * query_stride_t + heads * query_stride_h)[:, None] + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    page_row = page_table + sequence.to(tl.int64) * page_stride
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sinks is not None:
        if OWN_SINKS:
            row_max = tl.load(sinks + own, mask=live, other=0.0).to(tl.float32) * LOG2E
        else:
            row_max = tl.load(sinks + heads).to(tl.float32) * LOG2E
        row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)

    #  load_first                      inner       outer                          end
    #      |---- some rows see it -------|--- all ---|-- up to the row's own place --|
    first_position = context + first_token
    last_position = context + tl.minimum(first_token + BLOCK_Q, length) - 1
    end = last_position + 1
    load_first = first_key(first_position, WINDOW, CHUNK)
    begin = load_first // BLOCK_N * BLOCK_N
    inner = tl.cdiv(first_key(last_position, WINDOW, CHUNK), BLOCK_N) * BLOCK_N
    outer = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, inner)
    for REGION in tl.static_range(3):
        if REGION == 0:
            region_begin, region_end = begin, tl.minimum(inner, end)
        elif REGION == 1:
            region_begin, region_end = inner, outer
        else:
            region_begin, region_end = outer, end
        if REGION > 0 or WINDOW is not None or CHUNK is not None:
            acc, row_max, row_sum = attend(
                q,
                acc,
                row_max,
                row_sum,
                region_begin,
                region_end,
                load_first,
                last_position,
                positions,
                heads,
                kv_head,
                page_row,
                None,
                key_pages,
                value_pages,
                key_bias_pages,
                alibi_slopes,
                rel_bias,
                distance_bias,
                own,
                scale,
                softcap,
                REGION != 1,
                WINDOW,
                CHUNK,
                DISTANCES,
                EXTENT,
                PAGE_SIZE,
                G,
                D,
                DV,
                BLOCK_D,
                BLOCK_DV,
                BLOCK_N,
            )

    result = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    places = (rows * H + heads) * DV
    tl.store(output + places[:, None] + dv[None, :], result.to(output.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])
