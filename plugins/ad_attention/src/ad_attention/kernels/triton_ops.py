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
def decode_row(cu_seqlens, context_lens, num_sequences, index, ITEMS: tl.constexpr):
    """Which query a program of the decode kernels works on: (row, sequence, position). Row -1: none, another launch has it.

    Work item `index` is by ITEMS
    "rows":     row `index`, whatever its sequence; a padding row has position -1 and so sees no key;
    "several":  the same, but none if the row is its sequence's only one;
    "singles":  the row of sequence `index`, none unless that has exactly one.
    """
    if ITEMS == "singles":
        sequence = index
        begin = tl.load(cu_seqlens + sequence)
        length = tl.load(cu_seqlens + sequence + 1) - begin
        row = tl.where(length == 1, begin, -1)
        position = tl.load(context_lens + sequence)
    else:
        owner = sequence_of(cu_seqlens, num_sequences, index, None)
        sequence = tl.minimum(owner, num_sequences - 1)
        context = tl.load(context_lens + sequence)
        begin = tl.load(cu_seqlens + sequence)
        row = index
        position = tl.where(owner < num_sequences, context + index - begin, -1)
        if ITEMS == "several":
            length = tl.load(cu_seqlens + sequence + 1) - begin
            row = tl.where((length == 1) & (position >= 0), -1, row)
    return row, sequence, position


@triton.jit
def key_splits(
    first_position,
    last_position,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHOICES: tl.constexpr,
    S: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How the keys of queries at `first_position` to `last_position` are cut: (begin, end, keys a split, number of splits).

    Keys are counted by their place in the sequence or, with CHOICES, in the one query's list of so many. Padding has none.
    """
    if CHOICES is None:
        begin = first_key(first_position, WINDOW, CHUNK) // BLOCK_N * BLOCK_N
        end = last_position + 1
    else:
        begin = last_position * 0
        end = tl.where(last_position < 0, 0, CHOICES)
    length = tl.maximum(tl.cdiv(tl.cdiv(end - begin, BLOCK_N), S), MIN_SPLIT // BLOCK_N) * BLOCK_N
    return begin, end, length, tl.cdiv(end - begin, length)


@triton.jit
def soften(scores, row_max, row_sum):
    """A step of the online softmax over scores [M, N] in log2 units: (weights, decay of earlier sums, new row_max, new row_sum)."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # A row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - origin[:, None])
    decay = tl.exp2(row_max - origin)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, axis=1)
