"""mLSTM over memories in slots: chunk after chunk, a head's memory in registers all the while.

B sequences, C tokens of a chunk, H heads, K key size, V value size. A token is a chunk of one, so there is one kernel for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_linear.kernels.triton_ops import dot, log_sigmoid, scores


@triton.jit
def mlstm_kernel(
    output,  # [T, H, V]
    query,  # [T, H, K]
    key,
    value,  # [T, H, V]
    input_gate,  # [T, H], contiguous
    forget_gate,
    memory_pool,  # [slots, H, K, V + 1], the normaliser last: written at the sequence's slot
    peak_pool,  # [slots, H]: read; the normaliser and it are written by `mlstm_norm_kernel`
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
    NORM: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid [B, H, cdiv(V, BLOCK_V)]. Every program needs the normaliser and the peak as they were, and computes on with its own copy:
    so they are written by a second launch (NORM, grid [B, H, 1]), which writes nothing else."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    origin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - origin
    if length == 0:
        return
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = k < K, v < V
    slot = tl.load(state_slots + sequence).to(tl.int64) * H + head
    base = memory_pool + slot * K * (V + 1) + k * (V + 1)
    tile = base[:, None] + v[None, :]
    inside = in_k[:, None] & in_v[None, :]
    # A slot of a sequence that starts here holds what another left, perhaps NaN: it is not even read.
    started = tl.load(fresh + sequence) == 0
    norm = tl.load(base + V, mask=in_k & started, other=0.0)  # [K]
    peak = tl.load(peak_pool + slot, mask=started, other=0.0)
    memory = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if not NORM:
        memory = tl.load(tile, mask=inside & started, other=0.0)

    for start in range(0, length, BLOCK_C):
        live = start + c < length
        rows = origin + start + c
        at_k, at_v = live[:, None] & in_k[None, :], live[:, None] & in_v[None, :]
        keys = tl.load(key + (rows * key_stride_t + head * key_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0).to(tl.float32)
        gates = tl.load(input_gate + rows * H + head, mask=live, other=float("-inf")).to(tl.float32)
        forget = log_sigmoid(tl.load(forget_gate + rows * H + head, mask=live, other=0.0).to(tl.float32))
        forget = tl.where(live, forget, 0.0)  # past the end nothing is forgotten, and nothing is written
        total = tl.cumsum(forget, axis=0)
        # Relative to the decay since the chunk's start: see matrix_memory in ad_linear.mlstm.
        source = gates - total
        seen = tl.where(c[:, None] >= c[None, :], source[None, :], float("-inf"))
        best = tl.maximum(tl.max(seen, axis=1), peak)  # [C]
        last = tl.maximum(tl.max(source, axis=0), peak)
        writing = keys * tl.exp(source - last)[:, None]
        kept = tl.exp(peak - last)
        if not NORM:
            queries = tl.load(query + (rows * query_stride_t + head * query_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0)
            values = tl.load(value + (rows * value_stride_t + head * value_stride_h)[:, None] + v[None, :], mask=at_v, other=0.0)
            queries, values = queries.to(tl.float32) * scale, values.to(tl.float32)
            weights = scores(queries, keys, BLOCK_C) * tl.exp(seen - best[:, None])
            from_past = tl.exp(peak - best)
            read = dot(weights, values) + dot(queries, memory) * from_past[:, None]
            size = tl.sum(weights, axis=1) + tl.sum(queries * norm[None, :], axis=1) * from_past
            bound = tl.maximum(tl.abs(size), tl.exp(-(total + best))) + eps
            result = (read / bound[:, None]).to(output.dtype.element_ty)
            tl.store(output + ((rows * H + head) * V)[:, None] + v[None, :], result, mask=at_v)
            memory = memory * kept + dot(tl.trans(writing), values)
        norm = norm * kept + tl.sum(writing, axis=0)
        peak = tl.sum(forget, axis=0) + last
    if NORM:
        tl.store(base + V, norm, mask=in_k)
        tl.store(peak_pool + slot, peak)
    else:
        tl.store(tile, memory, mask=inside)
