"""One token of a sequence: reads its state once, writes it once. Bound by memory, so nothing is padded to the size of a matrix unit.

B sequences, H query and key heads, HV value heads, K key size, V value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_deltanet.kernels.triton_ops import normalised


@triton.jit
def decode_kernel(
    output,  # [T, HV, V]
    query,  # [T, H, K]
    key,
    value,  # [T, HV, V]
    log_decay,  # [T, HV] or [T, HV, K], contiguous, or None
    beta,  # [T, HV], contiguous
    state,  # [slots, HV, K, V]: written at the sequence's slot
    cu_seqlens,  # [B + 1]
    state_slots,  # [B]
    fresh,  # [B]
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    scale,
    eps,
    L2NORM: tl.constexpr,
    CHANNELS: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid [B, HV, cdiv(V, BLOCK_V)]. Sequences with no token, or with several, are left alone."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(cu_seqlens + sequence).to(tl.int64)
    if tl.load(cu_seqlens + sequence + 1) - row != 1:
        return
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_head = head // (HV // H)
    in_k, in_v = k < K, v < V
    queries = tl.load(query + row * query_stride_t + key_head * query_stride_h + k, mask=in_k, other=0.0).to(tl.float32)
    keys = tl.load(key + row * key_stride_t + key_head * key_stride_h + k, mask=in_k, other=0.0).to(tl.float32)
    values = tl.load(value + row * value_stride_t + head * value_stride_h + v, mask=in_v, other=0.0).to(tl.float32)
    queries = normalised(queries, eps, 0, L2NORM) * scale
    keys = normalised(keys, eps, 0, L2NORM)
    step = tl.load(beta + row * HV + head).to(tl.float32)

    place = (tl.load(state_slots + sequence).to(tl.int64) * HV + head) * K * V
    tile = state + place + k[:, None] * V + v[None, :]
    inside = in_k[:, None] & in_v[None, :]
    # A slot of a sequence that starts here holds what another left, perhaps NaN: it is not even read.
    started = tl.load(fresh + sequence) == 0
    memory = tl.load(tile, mask=inside & started, other=0.0)
    if log_decay is not None:
        if CHANNELS:
            memory *= tl.exp(tl.load(log_decay + (row * HV + head) * K + k, mask=in_k, other=0.0).to(tl.float32))[:, None]
        else:
            memory *= tl.exp(tl.load(log_decay + row * HV + head).to(tl.float32))
    known = tl.sum(memory * keys[:, None], axis=0)
    memory += keys[:, None] * ((values - known) * step)[None, :]
    tl.store(tile, memory, mask=inside)
    result = tl.sum(memory * queries[:, None], axis=0)
    tl.store(output + (row * HV + head) * V + v, result.to(output.dtype.element_ty), mask=in_v)
