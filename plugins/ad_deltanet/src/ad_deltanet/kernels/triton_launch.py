"""The host side of the Triton kernels: which are launched, with what grid. Shapes decide, never the contents of a tensor.

Importing this module needs triton; `triton_slots` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from ad_deltanet.kernels.triton_decode import decode_kernel
from ad_deltanet.kernels.triton_ops import INTERPRET
from ad_deltanet.kernels.triton_prefill import prefill_kernel
from ad_deltanet.op import NORM_EPS

__all__ = ["INTERPRET", "delta_rule"]

CHUNK = 16
"""Tokens of a chunk: the rows of the smallest matrix instruction, and few enough for a system that is solved row by row."""


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    *,
    scale: float,
    l2norm: bool,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """The body of both cached ops; shapes and mutation are told in `triton_slots`."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    _, T, H, K = query.shape
    HV, V = value.shape[2:]
    B = cu_seqlens.shape[0] - 1
    output = value.new_zeros(value.shape)  # rows of padding stay so
    if T == 0 or B == 0:
        return output
    block_k = max(16, triton.next_power_of_2(K))
    inputs = (query, key, value, None if g is None else g.contiguous(), beta.contiguous(), state, cu_seqlens, state_slots, fresh)
    strides = (query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2))
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "BLOCK_K": block_k, "L2NORM": l2norm}
    sizes |= {"CHANNELS": g is not None and g.dim() == 4, "enable_fp_fusion": True}
    with _device(query):
        grid, block_v = _tiles(B, HV, V, 8192 // block_k)
        decode_kernel[grid](output, *inputs, *strides, scale, NORM_EPS, BLOCK_V=block_v, num_warps=4, **sizes)
        # Which sequences have several tokens is known on the device only: of padded ones, B may count more than there are tokens.
        if T > 1:
            grid, block_v = _tiles(B, HV, V, 4096 // block_k)
            prefill_kernel[grid](
                output, *inputs, *strides, scale, NORM_EPS, BLOCK_C=CHUNK, BLOCK_V=block_v, num_warps=8, num_stages=1, **sizes
            )
    return output


def _tiles(B: int, HV: int, V: int, limit: int) -> tuple[tuple[int, int, int], int]:
    """The grid, and how many columns of a state are one program's: at most `limit`, which its registers hold."""
    block_v = max(16, min(triton.next_power_of_2(V), limit, 64))
    return (B, HV, -(-V // block_v)), block_v


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
