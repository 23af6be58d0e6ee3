"""SSD over slots: one token after the other for sequences that decode, chunk after chunk, as matrix products, for those that prefill.

Every kernel has the grid [sequences, H, cdiv(P, BLOCK_P)]. Sequences without tokens are left alone; the slot of one that starts here
is not read: it holds what another left, perhaps NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_mamba.kernels.triton_ops import dot, silu, time_step


@triton.jit
def ssd_update_kernel(
    output,  # [T, H, P]
    x,  # [T, H, P], rows `x_stride` apart; so the others
    dt,  # [T, H]
    A,  # [H]
    B,  # [T, G, N]
    C,
    skip,  # [H] or [H, P], or None
    z,  # [T, H, P] or None
    dt_bias,  # [H] or None
    ssm_state,  # [slots, H, P, N]
    cu_seqlens,  # [sequences + 1]
    state_slots,  # [sequences]
    fresh,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    SKIP_BY_ELEMENT: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token of each sequence; longer ones are the other kernel's."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    row = tl.load(cu_seqlens + sequence).to(tl.int64)
    if tl.load(cu_seqlens + sequence + 1) - row != 1:
        return
    group = head // (H // G)
    tile, live = (p < P)[:, None] & (n < N)[None, :], p < P
    held = ssm_state + ((tl.load(state_slots + sequence).to(tl.int64) * H + head) * P + p)[:, None] * N + n[None, :]
    state = tl.load(held, mask=tile & (tl.load(fresh + sequence) == 0), other=0.0)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + head).to(tl.float32)
    step = time_step(tl.load(dt + row * dt_stride + head), bias, SOFTPLUS, dt_min, dt_max)
    values = tl.load(x + row * x_stride + head * P + p, mask=live, other=0.0).to(tl.float32)
    b = tl.load(B + row * B_stride + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(C + row * C_stride + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    state = tl.exp(step * tl.load(A + head).to(tl.float32)) * state + (step * values)[:, None] * b[None, :]
    tl.store(held, state, mask=tile)
    result = tl.sum(state * c[None, :], axis=1)
    if skip is not None:
        result += tl.load(skip + (head * P + p if SKIP_BY_ELEMENT else head + p * 0), mask=live, other=0.0).to(tl.float32) * values
    if z is not None:
        result *= silu(tl.load(z + row * z_stride + head * P + p, mask=live, other=0.0).to(tl.float32))
    tl.store(output + (row * H + head) * P + p, result.to(output.dtype.element_ty), mask=live)


@triton.jit
def ssd_prefill_kernel(
    output,
    x,
    dt,
    A,
    B,
    C,
    skip,
    z,
    dt_bias,
    ssm_state,
    cu_seqlens,
    state_slots,
    fresh,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    z_stride,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    SKIP_BY_ELEMENT: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sequences of several tokens, CHUNK at a time with the state in registers. Rows past the end get a step of zero: they neither
    add to the state nor let it decay."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if end - begin < 2:
        return
    group = head // (H // G)
    tile, order = (p < P)[:, None] & (n < N)[None, :], tl.arange(0, CHUNK)
    held = ssm_state + ((tl.load(state_slots + sequence).to(tl.int64) * H + head) * P + p)[:, None] * N + n[None, :]
    state = tl.load(held, mask=tile & (tl.load(fresh + sequence) == 0), other=0.0)
    rate = tl.load(A + head).to(tl.float32)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + head).to(tl.float32)
    for first in range(begin, end, CHUNK):
        rows = first + order
        live = rows < end
        steps = time_step(tl.load(dt + rows * dt_stride + head, mask=live, other=0.0), bias, SOFTPLUS, dt_min, dt_max)
        steps = tl.where(live, steps, 0.0)
        decay = tl.cumsum(steps * rate, axis=0)  # logarithm of the decay since the chunk began
        total = tl.sum(steps * rate, axis=0)
        by_n = live[:, None] & (n < N)[None, :]
        keys = tl.load(B + rows[:, None] * B_stride + group * N + n[None, :], mask=by_n, other=0.0).to(tl.float32)
        queries = tl.load(C + rows[:, None] * C_stride + group * N + n[None, :], mask=by_n, other=0.0).to(tl.float32)
        by_p = live[:, None] & (p < P)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + head * P + p[None, :], mask=by_p, other=0.0).to(tl.float32)
        weighted = values * steps[:, None]

        reach = tl.where(order[:, None] >= order[None, :], decay[:, None] - decay[None, :], float("-inf"))
        scores = dot(queries, tl.trans(keys), PRECISION) * tl.exp(reach)
        result = dot(scores, weighted, PRECISION) + dot(queries, tl.trans(state), PRECISION) * tl.exp(decay)[:, None]
        state = tl.exp(total) * state + dot(tl.trans(weighted * tl.exp(total - decay)[:, None]), keys, PRECISION)

        if skip is not None:
            result += (
                tl.load(skip + (head * P + p if SKIP_BY_ELEMENT else head + p * 0), mask=p < P, other=0.0).to(tl.float32)[None, :] * values
            )
        if z is not None:
            result *= silu(tl.load(z + rows[:, None] * z_stride + head * P + p[None, :], mask=by_p, other=0.0).to(tl.float32))
        tl.store(output + (rows[:, None] * H + head) * P + p[None, :], result.to(output.dtype.element_ty), mask=by_p)
    tl.store(held, state, mask=tile)
