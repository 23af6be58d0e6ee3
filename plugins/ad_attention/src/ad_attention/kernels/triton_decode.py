"""Single queries against long caches: split-KV attention in two kernels, after Flash-Decoding (Dao et al., 2023).

A sequence's keys are cut into splits whose borders depend on its own length alone. How many programs share the splits
is a matter of the grid, so a row's result is the same in any batch. Lengths are read from device memory: a CUDA
graph that holds the launch stays right as sequences grow.

R work items (rows or sequences, see `decode_row`), S splits at most, M = packed query heads of one key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_attention.kernels.triton_ops import LOG2E, decode_row, first_key, key_splits
from ad_attention.kernels.triton_tile import attend


@triton.jit(do_not_specialize=["num_sequences", "page_stride"])
def decode_kernel(
    output,  # [T, H, DV], written if S is 1
    partial_output,  # [R, H, S, DV] float32 or None
    partial_lse,  # [R, H, S] float32 or None: log2 of the sum of weights
    query,  # [T, H, D], strides given
    key_pages,
    value_pages,
    key_bias_pages,
    sinks,  # [H], with OWN_SINKS [T, H], or None
    alibi_slopes,
    rel_bias,
    distance_bias,
    selected,  # [T, CHOICES]: keys that a row sees, negative ones are none; or None
    cu_seqlens,  # [B + 1]
    context_lens,  # [B]
    page_table,  # [B, P]
    num_sequences,
    query_stride_t,
    query_stride_h,
    page_stride,
    scale,
    softcap,
    ITEMS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHOICES: tl.constexpr,
    DISTANCES: tl.constexpr,
    EXTENT: tl.constexpr,
    OWN_SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid [R, G * head blocks, workers]. Worker w has splits w, w + workers, ...: each an attention of its own."""
    item = tl.program_id(0)
    row, sequence, position = decode_row(cu_seqlens, context_lens, num_sequences, item, ITEMS)
    if row < 0:
        return
    first, last, split_length, count = key_splits(position, position, WINDOW, CHUNK, CHOICES, S, MIN_SPLIT, BLOCK_N)
    if tl.program_id(2) >= tl.maximum(count, 1):
        return

    HEAD_BLOCKS: tl.constexpr = (H // G + PACK - 1) // PACK
    kv_head = tl.program_id(1) // HEAD_BLOCKS
    member = tl.program_id(1) % HEAD_BLOCKS * PACK + tl.arange(0, BLOCK_M)
    live = (tl.arange(0, BLOCK_M) < PACK) & (member < H // G)
    heads = kv_head * (H // G) + tl.where(live, member, 0)
    positions = tl.where(live, position, -1)
    own = row.to(tl.int64) * H + heads
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q = tl.load(
        query + row.to(tl.int64) * query_stride_t + heads[:, None] * query_stride_h + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    page_row = page_table + sequence.to(tl.int64) * page_stride
    chosen = None if selected is None else selected + row.to(tl.int64) * CHOICES

    # A row of padding has no split, but with S = 1 somebody must write its zeros.
    for split in range(tl.program_id(2), tl.maximum(count, 1) if S == 1 else count, tl.num_programs(2)):
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        if S == 1 and sinks is not None:
            if OWN_SINKS:
                row_max = tl.load(sinks + own, mask=positions >= 0, other=0.0).to(tl.float32) * LOG2E
            else:
                row_max = tl.load(sinks + heads).to(tl.float32) * LOG2E
            row_sum += 1.0
        begin = first + split * split_length
        acc, row_max, row_sum = attend(
            q,
            tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
            row_max,
            row_sum,
            begin,
            tl.minimum(begin + split_length, last),
            first_key(position, WINDOW, CHUNK),
            position,
            positions,
            heads,
            kv_head,
            page_row,
            chosen,
            key_pages,
            value_pages,
            key_bias_pages,
            alibi_slopes,
            rel_bias,
            distance_bias,
            own,
            scale,
            softcap,
            True,
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
        stored = live[:, None] & (dv < DV)[None, :]
        if S == 1:
            places = (row.to(tl.int64) * H + heads) * DV
            tl.store(output + places[:, None] + dv[None, :], result.to(output.dtype.element_ty), mask=stored)
        else:
            places = (item.to(tl.int64) * H + heads) * S + split
            tl.store(partial_output + places[:, None] * DV + dv[None, :], result, mask=stored)
            tl.store(partial_lse + places, row_max + tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), mask=live)


@triton.jit(do_not_specialize=["num_sequences"])
def combine_kernel(
    output,  # [T, H, DV]
    partial_output,  # [R, H, S, DV]
    partial_lse,  # [R, H, S]
    sinks,
    cu_seqlens,
    context_lens,
    num_sequences,
    ITEMS: tl.constexpr,
    OWN_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHOICES: tl.constexpr,
    H: tl.constexpr,
    DV: tl.constexpr,
    S: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid [R, H]: merges the splits of one row and head, in their order. Writes zeros for a row of padding."""
    item, head = tl.program_id(0), tl.program_id(1)
    row, _, position = decode_row(cu_seqlens, context_lens, num_sequences, item, ITEMS)
    if row < 0:
        return
    _, _, _, count = key_splits(position, position, WINDOW, CHUNK, CHOICES, S, MIN_SPLIT, BLOCK_N)
    split = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    # Splits that do not exist hold what another step left there.
    live = split < count
    places = (item.to(tl.int64) * H + head) * S + split
    lse = tl.load(partial_lse + places, mask=live, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    if sinks is not None:
        if OWN_SINKS:
            sink = tl.load(sinks + row.to(tl.int64) * H + head, mask=position >= 0, other=0.0).to(tl.float32) * LOG2E
        else:
            sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(lse - largest)
    total = tl.sum(weights, axis=0)
    if sinks is not None:
        total += tl.exp2(sink - largest)
    parts = tl.load(partial_output + places[:, None] * DV + dv[None, :], mask=live[:, None] & (dv < DV)[None, :], other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(output + (row.to(tl.int64) * H + head) * DV + dv, result.to(output.dtype.element_ty), mask=dv < DV)
