"""The causal convolution over slots in Triton. B sequences, C channels, K taps; blocks of channels go side by side.

The slot of a sequence that starts here is not even read: it holds what another left, perhaps NaN. Sequences without tokens are left alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sequence_of(cu_seqlens, num_sequences, block, BLOCK_T: tl.constexpr):
    """Block i of sequence s has the number cu_seqlens[s] // BLOCK_T + s + i; numbers between two sequences belong to nobody.
    Returns the last sequence whose blocks begin at or before `block`."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_T + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def filtered(
    x, weight, bias, conv_state, slot, begin, row, started, c, live, row_stride, C: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr
):
    """The output of token `row` (a column of tokens, or one) of the sequence that begins at token `begin`, for channels `c`."""
    result = tl.zeros_like(live.to(tl.float32))
    if bias is not None:
        result += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        source = row - (K - 1 - k)
        tap = tl.load(weight + c * K + k, mask=c < C, other=0.0).to(tl.float32)
        result += tap * tl.load(x + source * row_stride + c, mask=live & (source >= begin), other=0.0).to(tl.float32)
        if k < K - 1:
            held = conv_state + (slot * (K - 1) + source - begin + K - 1) * C + c
            result += tap * tl.load(held, mask=live & (source < begin) & started, other=0.0).to(tl.float32)
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    return result


@triton.jit
def move_on(x, conv_state, slot, begin, end, started, c, row_stride, C: tl.constexpr, K: tl.constexpr):
    """The state after the sequence's tokens. Rows are written in order, and what one is made of lies at or behind it."""
    for k in tl.static_range(K - 1):
        source = end - (K - 1 - k)
        new = tl.load(x + source * row_stride + c, mask=(c < C) & (source >= begin), other=0.0)
        held = conv_state + (slot * (K - 1) + source - begin + K - 1) * C + c
        old = tl.load(held, mask=(c < C) & (source < begin) & started, other=0.0)
        value = tl.where(source >= begin, new, old)
        tl.store(conv_state + (slot * (K - 1) + k) * C + c, value, mask=c < C)


@triton.jit
def update_kernel(
    output,  # [T, C]
    x,  # [T, C], rows `row_stride` apart
    weight,  # [C, K]
    bias,  # [C] or None
    conv_state,  # [slots, K - 1, C] or None
    cu_seqlens,  # [B + 1]
    state_slots,  # [B]
    fresh,  # [B]
    row_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    WRITE_OUTPUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid [B, cdiv(C, BLOCK_C)]: token after token, then the state. Without `WRITE_OUTPUT` only the state."""
    sequence = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin == end:
        return
    slot, started = tl.load(state_slots + sequence).to(tl.int64), tl.load(fresh + sequence) == 0
    if WRITE_OUTPUT:
        for row in range(begin, end):
            result = filtered(x, weight, bias, conv_state, slot, begin, row, started, c, c < C, row_stride, C, K, SILU)
            tl.store(output + row * C + c, result.to(output.dtype.element_ty), mask=c < C)
    if K > 1:
        move_on(x, conv_state, slot, begin, end, started, c, row_stride, C, K)


@triton.jit(do_not_specialize=["num_sequences"])
def prefill_kernel(
    output,
    x,
    weight,
    bias,
    conv_state,
    cu_seqlens,
    state_slots,
    fresh,
    num_sequences,
    row_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid [cdiv(T, BLOCK_T) + B, cdiv(C, BLOCK_C)]: outputs only, so that no block waits for another. States follow in a launch of
    their own."""
    block = tl.program_id(0)
    sequence = sequence_of(cu_seqlens, num_sequences, block, BLOCK_T)
    begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    first = begin + (block - begin // BLOCK_T - sequence) * BLOCK_T
    if first >= end:
        return
    rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    live = (rows < end) & (c < C)
    slot, started = tl.load(state_slots + sequence).to(tl.int64), tl.load(fresh + sequence) == 0
    result = filtered(x, weight, bias, conv_state, slot, begin, rows, started, c, live, row_stride, C, K, SILU)
    tl.store(output + rows * C + c, result.to(output.dtype.element_ty), mask=live)
