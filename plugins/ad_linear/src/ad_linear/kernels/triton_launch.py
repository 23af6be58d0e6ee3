"""The host side of the Triton kernels: which are launched, with what grid. Shapes decide, never the contents of a tensor.

Importing this module needs triton; `triton_slots` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from ad_linear.kernels.triton_lightning import lightning_kernel
from ad_linear.kernels.triton_mlstm import mlstm_kernel
from ad_linear.kernels.triton_ops import INTERPRET

__all__ = ["INTERPRET", "lightning", "mlstm"]

CHUNK = 16
"""Tokens of a chunk: the rows of the smallest matrix instruction."""


def lightning(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor, scale: float, state: torch.Tensor, *places: Any
) -> torch.Tensor:
    """The body of `ad_linear::lightning_triton`; shapes and mutation are told in `triton_slots`. `places`: cu_seqlens, state_slots,
    fresh."""
    query, key, value = (_unit_stride(x) for x in (query, key, value))
    output = value.new_zeros(value.shape)  # rows of padding stay so
    T, B = value.shape[1], places[0].shape[0] - 1
    if T == 0 or B == 0:
        return output
    sizes, tiles = _sizes(key, value)
    arguments = (query, key, value, log_decay.contiguous(), state, *places, *_strides(query, key, value), scale)
    with _device(query):
        grid = (B, value.shape[2], tiles)
        lightning_kernel[grid](output, *arguments, ONE=True, num_warps=4, **sizes)
        if T > 1:  # which sequences have several tokens is known on the device only
            lightning_kernel[grid](output, *arguments, ONE=False, num_warps=8, num_stages=1, **sizes)
    return output


def mlstm(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    scale: float,
    eps: float,
    *pools_and_places: Any,
) -> torch.Tensor:
    """The body of `ad_linear::mlstm_triton`, likewise. `pools_and_places`: memory, peak, cu_seqlens, state_slots, fresh."""
    query, key, value = (_unit_stride(x) for x in (query, key, value))
    output = value.new_zeros(value.shape)
    B = pools_and_places[2].shape[0] - 1
    if value.shape[1] == 0 or B == 0:
        return output
    sizes, tiles = _sizes(key, value)
    gates = (input_gate.contiguous(), forget_gate.contiguous())
    arguments = (query, key, value, *gates, *pools_and_places, *_strides(query, key, value), scale, eps)
    with _device(query):
        for norm in (False, True):  # in this order: the second writes what the first reads
            grid = (B, value.shape[2], 1 if norm else tiles)
            mlstm_kernel[grid](output, *arguments, NORM=norm, num_warps=8, num_stages=1, **sizes)
    return output


def _sizes(key: torch.Tensor, value: torch.Tensor) -> tuple[dict[str, Any], int]:
    """Constants of the kernels, and the number of tiles that a head's values take."""
    H, V = value.shape[2:]
    K = key.shape[3]
    block_k = max(16, triton.next_power_of_2(K))
    block_v = max(16, min(triton.next_power_of_2(V), 4096 // block_k, 64))  # what a program's registers hold
    sizes = {"H": H, "K": K, "V": V, "BLOCK_C": CHUNK, "BLOCK_K": block_k, "BLOCK_V": block_v, "enable_fp_fusion": True}
    return sizes, -(-V // block_v)


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride(axis) for tensor in tensors for axis in (1, 2))


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
