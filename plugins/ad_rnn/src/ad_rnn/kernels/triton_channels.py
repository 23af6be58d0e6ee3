"""Recurrences by channel over states in slots: a program takes a block of channels through its sequence, token after token.

B sequences, D channels. Every kernel has the grid [B, cdiv(D, BLOCK_D)], leaves sequences without tokens alone, and does not even read
the slot of a sequence that starts here: it holds what another left, perhaps NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rg_lru_kernel(
    output,  # [T, D]
    x,  # [T, D], contiguous
    gate,
    state,  # [slots, D]
    cu_seqlens,  # [B + 1]
    state_slots,  # [B]
    fresh,  # [B]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin == end:
        return
    place = state + tl.load(state_slots + sequence).to(tl.int64) * D + d
    held = tl.load(place, mask=(d < D) & (tl.load(fresh + sequence) == 0), other=0.0)
    for row in range(begin, end):
        here = row * D + d
        held = tl.load(gate + here, mask=d < D, other=0.0).to(tl.float32) * held + tl.load(x + here, mask=d < D, other=0.0).to(tl.float32)
        tl.store(output + here, held.to(output.dtype.element_ty), mask=d < D)
    tl.store(place, held, mask=d < D)


@triton.jit
def wkv4_kernel(
    output,  # [T, D]
    key,  # [T, D], contiguous
    value,
    time_decay,  # [D]
    time_first,
    state,  # [slots, 3, D]: sum of values, of weights, their peak
    cu_seqlens,  # [B + 1]
    state_slots,  # [B]
    fresh,  # [B]
    no_peak,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin == end:
        return
    place = state + tl.load(state_slots + sequence).to(tl.int64) * 3 * D + d
    started = (d < D) & (tl.load(fresh + sequence) == 0)
    total = tl.load(place, mask=started, other=0.0)
    weight = tl.load(place + D, mask=started, other=0.0)
    peak = tl.load(place + 2 * D, mask=started, other=no_peak)
    decay = -tl.exp(tl.load(time_decay + d, mask=d < D, other=0.0).to(tl.float32))
    bonus = tl.load(time_first + d, mask=d < D, other=0.0).to(tl.float32)
    for row in range(begin, end):
        here = row * D + d
        keys = tl.load(key + here, mask=d < D, other=0.0).to(tl.float32)
        values = tl.load(value + here, mask=d < D, other=0.0).to(tl.float32)
        highest = tl.maximum(peak, keys + bonus)
        old, new = tl.exp(peak - highest), tl.exp(keys + bonus - highest)
        result = (old * total + new * values) / (old * weight + new)
        tl.store(output + here, result.to(output.dtype.element_ty), mask=d < D)
        highest = tl.maximum(peak + decay, keys)
        old, new = tl.exp(peak + decay - highest), tl.exp(keys - highest)
        total, weight, peak = old * total + new * values, old * weight + new, highest
    tl.store(place, total, mask=d < D)
    tl.store(place + D, weight, mask=d < D)
    tl.store(place + 2 * D, peak, mask=d < D)


@triton.jit
def token_shift_kernel(
    output,  # [T, D]
    x,  # [T, D], contiguous
    state,  # [slots, D]
    cu_seqlens,  # [B + 1]
    state_slots,  # [B]
    fresh,  # [B]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin == end:
        return
    place = state + tl.load(state_slots + sequence).to(tl.int64) * D + d
    held = tl.load(place, mask=(d < D) & (tl.load(fresh + sequence) == 0), other=0.0)
    for row in range(begin, end):
        tl.store(output + row * D + d, held, mask=d < D)
        held = tl.load(x + row * D + d, mask=d < D, other=0.0)
    tl.store(place, held, mask=d < D)
