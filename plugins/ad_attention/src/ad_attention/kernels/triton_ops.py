"""What the Triton kernels share: an honest `dot`, and the way from a program to its sequence, its keys and their slots.

Importing this module needs triton. Whether functions are compiled or interpreted is decided here and now, by
`TRITON_INTERPRET`: set it before the first import.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are kept in units of log2, where the hardware's exponential is: score * LOG2E."""


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums. The only caller of Triton's own dot, for two reasons.

    The interpreter multiplies the bit patterns of bfloat16 as integers, silently; and the compiler's default for float32
    is tf32, which loses half of the digits.
    """
    if INTERPRET:
        result = acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def tanh(x):
    """From exp2, because CUDA's library functions do not run in the interpreter. Overflow gives exactly +-1."""
    return 1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * x) + 1.0)


@triton.jit
def load_tile(pointers, mask, MASKED: tl.constexpr):
    """A load that costs no comparison where the caller knows that every element is there. Masked elements are 0."""
    return tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def first_key(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key that the query at `position` (scalar or vector) sees. The last one is `position` itself."""
    first = position * 0
    if WINDOW is not None:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK is not None:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def slots_of(page_row, positions, mask, PAGE_SIZE: tl.constexpr):
    """Where the tokens at `positions` lie in the pools: page * page_size + offset, int64. Masked ones lie in the null page."""
    pages = tl.load(page_row + positions // PAGE_SIZE, mask=mask, other=0)
    return pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE


@triton.jit
def sequence_of(cu_seqlens, num_sequences, index, BLOCK_Q: tl.constexpr):
    """The sequence that owns work item `index`; `num_sequences` if none does, so the item is padding.

    Items are rows (BLOCK_Q None), or blocks of BLOCK_Q rows. Sequence b has its blocks at cu_seqlens[b] // BLOCK_Q + b
    and on: a bound that needs no prefix sum of block counts, so the grid depends on shapes alone. Counts instead of a
    binary search: one vector load in the place of a chain of dependent ones.
    """
    owner = 0
    for first in range(0, num_sequences, 128):
        b = first + 1 + tl.arange(0, 128)
        starts = tl.load(cu_seqlens + b, mask=b <= num_sequences, other=0)
        if BLOCK_Q is not None:
            starts = starts // BLOCK_Q + b
        owner += tl.sum(((starts <= index) & (b <= num_sequences)).to(tl.int32), axis=0)
    return owner


@triton.jit
def decode_row(cu_seqlens, context_lens, num_sequences, index, BY_ROW: tl.constexpr):
    """Which query a program of the decode kernels works on: (row, sequence, position).

    BY_ROW: item `index` is row `index`, whatever its sequence; a padding row has position -1 and so sees no key.
    Else it is sequence `index`, and row is -1 unless that has exactly one token: the prefill kernel has the others.
    """
    if BY_ROW:
        owner = sequence_of(cu_seqlens, num_sequences, index, None)
        sequence = tl.minimum(owner, num_sequences - 1)
        context = tl.load(context_lens + sequence)
        begin = tl.load(cu_seqlens + sequence)
        row = index
        position = tl.where(owner < num_sequences, context + index - begin, -1)
    else:
        sequence = index
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
        row = tl.where(length == 1, begin, -1)
        position = tl.load(context_lens + sequence)
    return row, sequence, position
