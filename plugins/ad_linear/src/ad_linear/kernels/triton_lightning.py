"""Linear attention with a fixed decay over states in slots: chunk after chunk, a head's state in registers all the while.

B sequences, C tokens of a chunk, H heads, K key size, V value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_linear.kernels.triton_ops import dot, scores


@triton.jit
def lightning_kernel(
    output,  # [T, H, V]
    query,  # [T, H, K]
    key,
    value,  # [T, H, V]
    log_decay,  # [H]
    state,  # [slots, H, K, V]: written at the sequence's slot
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
    ONE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid [B, H, cdiv(V, BLOCK_V)]. ONE: the sequences of one token, else those of several. Others are left alone."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    origin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - origin
    if (length == 0) | ((length == 1) != ONE):
        return
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = k < K, v < V
    tile = state + (tl.load(state_slots + sequence).to(tl.int64) * H + head) * K * V + k[:, None] * V + v[None, :]
    inside = in_k[:, None] & in_v[None, :]
    # A slot of a sequence that starts here holds what another left, perhaps NaN: it is not even read.
    started = tl.load(fresh + sequence) == 0
    memory = tl.load(tile, mask=inside & started, other=0.0)  # [K, V]
    decay = tl.load(log_decay + head).to(tl.float32)

    if ONE:
        queries = tl.load(query + origin * query_stride_t + head * query_stride_h + k, mask=in_k, other=0.0).to(tl.float32) * scale
        keys = tl.load(key + origin * key_stride_t + head * key_stride_h + k, mask=in_k, other=0.0).to(tl.float32)
        values = tl.load(value + origin * value_stride_t + head * value_stride_h + v, mask=in_v, other=0.0).to(tl.float32)
        memory = memory * tl.exp(decay) + keys[:, None] * values[None, :]
        result = tl.sum(memory * queries[:, None], axis=0)
        tl.store(output + (origin * H + head) * V + v, result.to(output.dtype.element_ty), mask=in_v)
    else:
        c = tl.arange(0, BLOCK_C)
        apart = c[:, None] - c[None, :]
        pairs = tl.where(apart >= 0, tl.exp(decay * tl.maximum(apart, 0).to(tl.float32)), 0.0)
        since_start = tl.exp(decay * (c + 1).to(tl.float32))[:, None]
        for start in range(0, length, BLOCK_C):
            live = start + c < length
            rows = origin + start + c
            at_k, at_v = live[:, None] & in_k[None, :], live[:, None] & in_v[None, :]
            queries = tl.load(query + (rows * query_stride_t + head * query_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0)
            keys = tl.load(key + (rows * key_stride_t + head * key_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0)
            values = tl.load(value + (rows * value_stride_t + head * value_stride_h)[:, None] + v[None, :], mask=at_v, other=0.0)
            queries, keys, values = queries.to(tl.float32) * scale, keys.to(tl.float32), values.to(tl.float32)
            result = dot(queries, memory) * since_start + dot(scores(queries, keys, BLOCK_C) * pairs, values)
            tl.store(output + ((rows * H + head) * V)[:, None] + v[None, :], result.to(output.dtype.element_ty), mask=at_v)
            # The last chunk decays by the tokens that it has, not by its size.
            tokens = tl.minimum(length - start, BLOCK_C).to(tl.int32)
            to_end = tl.exp(decay * tl.maximum(tokens - 1 - c, 0).to(tl.float32))[:, None]
            memory = memory * tl.exp(decay * tokens.to(tl.float32)) + dot(tl.trans(keys * to_end), values)
    tl.store(tile, memory, mask=inside)
