"""The selective scan over slots: a program takes a block of channels through its sequence, token after token."""

from __future__ import annotations

import triton
import triton.language as tl

from ad_mamba.kernels.triton_ops import silu, time_step


@triton.jit
def scan_kernel(
    output,  # [T, D]
    u,  # [T, D], rows `u_stride` apart; so the others
    delta,
    A,  # [D, N]
    B,  # [T, N]
    C,
    skip,  # [D] or None
    z,  # [T, D] or None
    delta_bias,  # [D] or None
    ssm_state,  # [slots, D, N]
    cu_seqlens,  # [sequences + 1]
    state_slots,  # [sequences]
    fresh,
    u_stride,
    delta_stride,
    B_stride,
    C_stride,
    z_stride,
    SOFTPLUS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid [sequences, cdiv(D, BLOCK_D)]. Sequences without tokens are left alone; the slot of one that starts here is not read: it
    holds what another left, perhaps NaN."""
    sequence = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    begin, end = tl.load(cu_seqlens + sequence).to(tl.int64), tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    if begin == end:
        return
    tile, places = (d < D)[:, None] & (n < N)[None, :], d[:, None] * N + n[None, :]
    held = ssm_state + tl.load(state_slots + sequence).to(tl.int64) * D * N + places
    state = tl.load(held, mask=tile & (tl.load(fresh + sequence) == 0), other=0.0)
    rate = tl.load(A + places, mask=tile, other=0.0).to(tl.float32)
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + d, mask=d < D, other=0.0).to(tl.float32)
    for row in range(begin, end):
        x = tl.load(u + row * u_stride + d, mask=d < D, other=0.0).to(tl.float32)
        step = time_step(tl.load(delta + row * delta_stride + d, mask=d < D, other=0.0), bias, SOFTPLUS, None, None)
        b = tl.load(B + row * B_stride + n, mask=n < N, other=0.0).to(tl.float32)
        c = tl.load(C + row * C_stride + n, mask=n < N, other=0.0).to(tl.float32)
        state = tl.exp(step[:, None] * rate) * state + (step * x)[:, None] * b[None, :]
        result = tl.sum(state * c[None, :], axis=1)
        if skip is not None:
            result += tl.load(skip + d, mask=d < D, other=0.0).to(tl.float32) * x
        if z is not None:
            result *= silu(tl.load(z + row * z_stride + d, mask=d < D, other=0.0).to(tl.float32))
        tl.store(output + row * D + d, result.to(output.dtype.element_ty), mask=d < D)
    tl.store(held, state, mask=tile)
