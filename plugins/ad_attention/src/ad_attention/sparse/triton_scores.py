"""An indexer's scores of all that a query sees, from paged index keys. I index heads of size D."""

from __future__ import annotations

import triton
import triton.language as tl

from ad_attention.kernels.triton_ops import decode_row, dot, slots_of


@triton.jit(do_not_specialize=["first_row", "num_sequences", "page_stride"])
def score_kernel(
    scores,  # [N, LENGTH] float32: of rows first_row to first_row + N, written where a key is seen
    query,  # [T, I, D], strides given
    weight,  # [T, I], strides given
    index_pages,  # [pages, PAGE_SIZE, D]
    cu_seqlens,  # [B + 1]
    context_lens,  # [B]
    page_table,  # [B, pages of a sequence]
    first_row,
    num_sequences,
    query_stride_t,
    query_stride_i,
    weight_stride_t,
    weight_stride_i,
    page_stride,
    scale,
    LENGTH: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid [N, workers]. Worker w has key tiles w, w + workers, ..."""
    item = tl.program_id(0)
    row, sequence, position = decode_row(cu_seqlens, context_lens, num_sequences, first_row + item, "rows")
    i = tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    source = row.to(tl.int64)
    q = tl.load(
        query + source * query_stride_t + i[:, None] * query_stride_i + d[None, :], mask=(i < I)[:, None] & (d < D)[None, :], other=0.0
    )
    w = tl.load(weight + source * weight_stride_t + i * weight_stride_i, mask=i < I, other=0.0).to(tl.float32)
    page_row = page_table + sequence.to(tl.int64) * page_stride
    for start in tl.range(tl.program_id(1) * BLOCK_N, position + 1, tl.num_programs(1) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n <= position
        slots = slots_of(page_row, n, there, PAGE_SIZE)
        keys = tl.load(index_pages + slots[None, :] * D + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)  # [D, N]
        products = dot(q, keys.to(q.dtype), tl.zeros([BLOCK_I, BLOCK_N], tl.float32)) * scale
        total = tl.sum(tl.maximum(products, 0.0) * w[:, None], axis=0)
        tl.store(scores + item.to(tl.int64) * LENGTH + n, total, mask=there)
