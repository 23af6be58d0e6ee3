"""Several tokens of a sequence, chunk after chunk, its state in registers all the while: the algorithm of `ad_deltanet.chunked`.

B sequences, C tokens of a chunk, H query and key heads, HV value heads, K key size, V value size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ad_deltanet.kernels.triton_ops import dot, normalised, row_of


@triton.jit
def prefill_kernel(
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
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid [B, HV, cdiv(V, BLOCK_V)]. Sequences of one token belong to the decode kernel."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    origin = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1) - origin
    if length <= 1:
        return
    c = tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_head = head // (HV // H)
    in_k, in_v = k < K, v < V
    place = (tl.load(state_slots + sequence).to(tl.int64) * HV + head) * K * V
    tile = state + place + k[:, None] * V + v[None, :]
    inside = in_k[:, None] & in_v[None, :]
    started = tl.load(fresh + sequence) == 0
    memory = tl.load(tile, mask=inside & started, other=0.0)  # [K, V]
    below, upto = c[:, None] > c[None, :], c[:, None] >= c[None, :]

    for start in range(0, length, BLOCK_C):
        live = start + c < length
        rows = origin + start + c
        at_k, at_v = live[:, None] & in_k[None, :], live[:, None] & in_v[None, :]
        # Tokens past the end are zeros: they decay nothing and write nothing.
        queries = tl.load(query + (rows * query_stride_t + key_head * query_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0)
        keys = tl.load(key + (rows * key_stride_t + key_head * key_stride_h)[:, None] + k[None, :], mask=at_k, other=0.0)
        values = tl.load(value + (rows * value_stride_t + head * value_stride_h)[:, None] + v[None, :], mask=at_v, other=0.0)
        steps = tl.load(beta + rows * HV + head, mask=live, other=0.0).to(tl.float32)[:, None]  # [C, 1]
        queries = normalised(queries.to(tl.float32), eps, 1, L2NORM) * scale
        keys = normalised(keys.to(tl.float32), eps, 1, L2NORM)

        if log_decay is not None:  # total: the decay of the chunk's tokens up to and with this one
            if CHANNELS:
                decays = tl.load(log_decay + ((rows * HV + head) * K)[:, None] + k[None, :], mask=at_k, other=0.0).to(tl.float32)
                total = tl.cumsum(decays, axis=0)  # [C, K]
                last = row_of(total, c == BLOCK_C - 1)  # [K]
            else:
                decays = tl.load(log_decay + rows * HV + head, mask=live, other=0.0).to(tl.float32)
                total = tl.cumsum(decays, axis=0)[:, None]  # [C, 1]
                last = tl.sum(decays, axis=0)

        # How token j's key is seen by the key and the query of token i, decayed on the way: row by row, since no exponent may be
        # positive (see _pairs_by_channel in ad_deltanet.chunked), and since a matrix unit's operands would take all registers.
        overlap = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        scores = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for i in range(0, BLOCK_C):
            here = c == i
            passed = keys
            if log_decay is not None:
                passed *= tl.exp(tl.minimum(row_of(total, here)[None, :] - total, 0.0))
            overlap = tl.where(here[:, None], tl.sum(passed * row_of(keys, here)[None, :], axis=1)[None, :], overlap)
            scores = tl.where(here[:, None], tl.sum(passed * row_of(queries, here)[None, :], axis=1)[None, :], scores)

        reading, erasing, writing = queries, keys, keys
        if log_decay is not None:
            reading, erasing = queries * tl.exp(total), keys * tl.exp(total)
            writing = keys * tl.exp(last - total)
        # What each token writes: its value without what the memory would already answer, the chunk's earlier tokens included.
        overlap = tl.where(below, overlap * steps, 0.0)
        corrections = (values.to(tl.float32) - dot(erasing, memory)) * steps  # [C, V]
        for i in range(1, BLOCK_C):
            here = c == i
            known = tl.sum(row_of(overlap, here)[:, None] * corrections, axis=0)
            corrections = tl.where(here[:, None], corrections - known[None, :], corrections)

        result = dot(reading, memory) + dot(tl.where(upto, scores, 0.0), corrections)
        tl.store(output + ((rows * HV + head) * V)[:, None] + v[None, :], result.to(output.dtype.element_ty), mask=at_v)
        if log_decay is not None:
            if CHANNELS:
                memory *= tl.exp(last)[:, None]
            else:
                memory *= tl.exp(last)
        memory += dot(tl.trans(writing), corrections)
    tl.store(tile, memory, mask=inside)
