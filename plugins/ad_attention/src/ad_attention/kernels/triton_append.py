"""Writes what a step's tokens leave behind to its places in the pools."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ad_attention.kernels.triton_host import FP_FUSION, unit_stride
from ad_attention.kernels.triton_tiles import block


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


@triton.jit(do_not_specialize=["num_sequences"])
def append_rows_kernel(
    left,  # [T, LEFT], stride given
    right,  # [T, RIGHT], stride given, or None
    pages,  # [pages, page_size, LEFT + RIGHT]
    token_slots,  # [T]
    cu_seqlens,  # [B + 1]
    num_sequences,
    left_stride,
    right_stride,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
):
    """Grid [T]: one row a token, of one part or two side by side. Rows of padding are skipped, as above."""
    token = tl.program_id(0)
    if token >= tl.load(cu_seqlens + num_sequences):
        return
    source = token.to(tl.int64)
    row = pages + tl.load(token_slots + token).to(tl.int64) * (LEFT + RIGHT)
    place = tl.arange(0, BLOCK_LEFT)
    entry = tl.load(left + source * left_stride + place, mask=place < LEFT)
    tl.store(row + place, entry.to(pages.dtype.element_ty), mask=place < LEFT)
    if right is not None:
        place = tl.arange(0, BLOCK_RIGHT)
        entry = tl.load(right + source * right_stride + place, mask=place < RIGHT)
        tl.store(row + LEFT + place, entry.to(pages.dtype.element_ty), mask=place < RIGHT)


def append_rows(
    pages: torch.Tensor, token_slots: torch.Tensor, cu_seqlens: torch.Tensor, left: torch.Tensor, right: torch.Tensor | None = None
) -> None:
    """Writes [1, T, L] and, to the right of it, [1, T, W] to the tokens' rows of `pages` [pages, page_size, L + W]."""
    left, right = unit_stride(left), None if right is None else unit_stride(right)
    width = 0 if right is None else right.shape[2]
    append_rows_kernel[(left.shape[1],)](
        left, right, pages, token_slots, cu_seqlens, cu_seqlens.shape[0] - 1, left.stride(1), 0 if right is None else right.stride(1),
        LEFT=left.shape[2], RIGHT=width, BLOCK_LEFT=block(left.shape[2]), BLOCK_RIGHT=block(width) if width else 0,
        num_warps=1 if left.shape[2] <= 128 else 4, **FP_FUSION,
    )  # fmt: skip
