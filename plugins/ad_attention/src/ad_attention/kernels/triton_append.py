"""Writes the step's keys, values and key biases to their places in the pools."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_sequences"])
def append_kernel(
    key,  # [T, G, D], strides given
    value,  # [T, G, DV], strides given
    key_bias,  # [T, G], strides given, or None
    key_pages,  # [pages, page_size, G, D]
    value_pages,  # [pages, page_size, G, DV]
    key_bias_pages,  # [pages, page_size, G] or None
    token_slots,  # [T]
    cu_seqlens,  # [B + 1]
    num_sequences,
    key_stride_t,
    key_stride_g,
    value_stride_t,
    value_stride_g,
    bias_stride_t,
    bias_stride_g,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid [T, cdiv(G, BLOCK_G)]. Rows of padding are skipped: what is in them must not even reach the null page."""
    token = tl.program_id(0)
    if token >= tl.load(cu_seqlens + num_sequences):
        return
    source = token.to(tl.int64)
    slot = tl.load(token_slots + token).to(tl.int64)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    mask = (g < G)[:, None] & (d < D)[None, :]
    entry = tl.load(key + source * key_stride_t + g[:, None] * key_stride_g + d[None, :], mask=mask)
    tl.store(key_pages + (slot * G + g)[:, None] * D + d[None, :], entry.to(key_pages.dtype.element_ty), mask=mask)

    mask = (g < G)[:, None] & (dv < DV)[None, :]
    entry = tl.load(value + source * value_stride_t + g[:, None] * value_stride_g + dv[None, :], mask=mask)
    tl.store(value_pages + (slot * G + g)[:, None] * DV + dv[None, :], entry.to(value_pages.dtype.element_ty), mask=mask)

    if key_bias_pages is not None:
        bias = tl.load(key_bias + source * bias_stride_t + g * bias_stride_g, mask=g < G)
        tl.store(key_bias_pages + slot * G + g, bias.to(key_bias_pages.dtype.element_ty), mask=g < G)
