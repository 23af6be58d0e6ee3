"""The grouped products of routed experts: gather, gate and up with the gate fused; down, or one projection alone, with the router's
weight fused.

N choices in the order of their experts; a block is BLOCK_M of them with one expert. T tokens, D their width, I inner width, O output width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_moe.kernels.triton_ops import activated, dot, gated


@triton.jit
def tile(pointer, expert, k, n, stride_e, stride_k, stride_n, K: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of one expert's weight. Experts are further apart than 32 bits tell."""
    pointers = pointer + expert.to(tl.int64) * stride_e + k[:, None] * stride_k + n[None, :] * stride_n
    return tl.load(pointers, mask=(k < K)[:, None] & (n < WIDTH)[None, :], other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def up_kernel(
    hidden,  # [N, I], written
    tokens,  # [T, D]
    weights,  # [T * choices], read if WEIGH
    order,  # [N]: place of each choice in the flattened choices
    blocks,  # [programs, 3]: expert (-1: nothing to do), first choice, one past the last
    gate,  # [E, I, D], any strides, or None
    up,  # [E, I, D]
    gate_bias,  # [E, I] or None
    up_bias,
    stride_t,
    gate_e,
    gate_n,
    gate_k,
    up_e,
    up_n,
    up_k,
    bias_e,
    bias_n,
    CHOICES: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    WEIGH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_ACTIVATED: tl.constexpr,
    OFFSET: tl.constexpr,
    GATE_CAP: tl.constexpr,
    UP_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid [programs, I / BLOCK_N]."""
    block = blocks + tl.program_id(0) * 3
    expert = tl.load(block)
    if expert < 0:
        return
    row = tl.load(block + 1) + tl.arange(0, BLOCK_M)
    live = row < tl.load(block + 2)
    place = tl.load(order + row, mask=live, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    MASKED: tl.constexpr = (D % BLOCK_K != 0) or (I % BLOCK_N != 0)
    sum_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sum_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    token = tokens + (place // CHOICES).to(tl.int64)[:, None] * stride_t
    for start in tl.range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(token + k[None, :], mask=live[:, None] & (k < D)[None, :], other=0.0)
        if WEIGH:
            weight = tl.load(weights + place, mask=live, other=0.0).to(x.dtype).to(tl.float32)
            x = (x.to(tl.float32) * weight[:, None]).to(x.dtype)
        if gate is not None:
            sum_gate = dot(x, tile(gate, expert, k, n, gate_e, gate_k, gate_n, D, I, MASKED), sum_gate)
        sum_up = dot(x, tile(up, expert, k, n, up_e, up_k, up_n, D, I, MASKED), sum_up)
    if up_bias is not None:
        sum_up += tl.load(up_bias + expert * bias_e + n * bias_n, mask=n < I, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        if gate_bias is not None:
            sum_gate += tl.load(gate_bias + expert * bias_e + n * bias_n, mask=n < I, other=0.0).to(tl.float32)[None, :]
        result = gated(sum_gate, sum_up, ACTIVATION, ALPHA, LIMIT, LIMIT_ACTIVATED, OFFSET, GATE_CAP, UP_CAP)
    else:
        result = activated(sum_up, ACTIVATION, ALPHA, GATE_CAP)
    tl.store(hidden + row.to(tl.int64)[:, None] * I + n[None, :], result, mask=live[:, None] & (n < I)[None, :])


@triton.jit
def down_kernel(
    results,  # [T * choices, O], written where a choice is an expert's
    hidden,  # [N, I]; with SHARED of what SHARED choices next to each other have in common, [T * choices / SHARED, I]
    weights,  # [T * choices], read unless WEIGH
    order,
    blocks,
    down,  # [E, O, I], any strides
    down_bias,  # [E, O] contiguous, or None
    down_e,
    down_n,
    down_k,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    SHARED: tl.constexpr,
    WEIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid [programs, O / BLOCK_N]."""
    block = blocks + tl.program_id(0) * 3
    expert = tl.load(block)
    if expert < 0:
        return
    row = tl.load(block + 1) + tl.arange(0, BLOCK_M)
    live = row < tl.load(block + 2)
    place = tl.load(order + row, mask=live, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    MASKED: tl.constexpr = (I % BLOCK_K != 0) or (O % BLOCK_N != 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    inner = hidden + (row if SHARED is None else place // SHARED).to(tl.int64)[:, None] * I
    for start in tl.range(0, I, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(inner + k[None, :], mask=live[:, None] & (k < I)[None, :], other=0.0)
        total = dot(h, tile(down, expert, k, n, down_e, down_k, down_n, I, O, MASKED), total)
    if down_bias is not None:
        total += tl.load(down_bias + expert * O + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    if not WEIGH:
        total *= tl.load(weights + place, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(results + place.to(tl.int64)[:, None] * O + n[None, :], total, mask=live[:, None] & (n < O)[None, :])
