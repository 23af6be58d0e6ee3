"""The host side of the Triton kernels. Shapes decide what is launched, never the contents of a tensor.

Importing this module needs triton; `triton_slots` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ad_mamba.kernels.triton_ops import INTERPRET
from ad_mamba.kernels.triton_scan import scan_kernel
from ad_mamba.kernels.triton_ssd import ssd_prefill_kernel, ssd_update_kernel

SCAN_CHANNELS, UPDATE_WIDTH = 64, 32
"""Tiles: from what fits registers when compiled for sm_90, not from measurements."""
__all__ = ["INTERPRET", "selective_scan", "ssd"]


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    ssm_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """The body of the cached op; shapes and mutation are told in `triton_slots`."""
    output, sequences = u.new_zeros(u.shape), state_slots.shape[0]  # rows of padding stay zero
    if u.shape[1] == 0 or sequences == 0:
        return output
    u, delta, B, C = (_dense_rows(value) for value in (u, delta, B, C))
    gate = None if z is None else _dense_rows(z)
    channels, size = A.shape
    tokens = (u, delta, A.contiguous(), B, C, _dense(D), gate, _dense(delta_bias))
    strides = (u.stride(1), delta.stride(1), B.stride(1), C.stride(1), 0 if gate is None else gate.stride(1))
    with _device(u):
        scan_kernel[(sequences, -(-channels // SCAN_CHANNELS))](
            output, *tokens, ssm_state, cu_seqlens, state_slots, fresh, *strides,
            SOFTPLUS=delta_softplus, D=channels, N=size, BLOCK_D=SCAN_CHANNELS, BLOCK_N=_block(size),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return output


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    ssm_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """The body of the cached op; shapes and mutation are told in `triton_slots`."""
    output, sequences = x.new_zeros(x.shape), state_slots.shape[0]  # rows of padding stay zero
    _, T, H, P = x.shape
    if T == 0 or sequences == 0:
        return output
    x, dt, B, C = (_dense_rows(value) for value in (x, dt, B, C))
    gate = None if z is None else _dense_rows(z)
    G, N = B.shape[2:]
    tokens = (x, dt, A.contiguous(), B, C, _dense(D), gate, _dense(dt_bias))
    strides = (x.stride(1), dt.stride(1), B.stride(1), C.stride(1), 0 if gate is None else gate.stride(1))
    arguments = (output, *tokens, ssm_state, cu_seqlens, state_slots, fresh, *strides, dt_min, dt_max)
    shape = {"SOFTPLUS": dt_softplus, "SKIP_BY_ELEMENT": D is not None and D.dim() == 2, "H": H, "P": P, "G": G, "N": N}
    shape |= {"BLOCK_N": max(16, _block(N)), "enable_fp_fusion": True}
    with _device(x):
        width = min(UPDATE_WIDTH, _block(P))
        ssd_update_kernel[(sequences, H, -(-P // width))](*arguments, BLOCK_P=width, num_warps=4, **shape)
        if sequences < T:  # some sequence has several tokens
            width, chunk, precision = _prefill_tiles(x.dtype, N)
            width = min(width, max(16, _block(P)))
            grid = (sequences, H, -(-P // width))
            ssd_prefill_kernel[grid](*arguments, BLOCK_P=width, CHUNK=chunk, PRECISION=precision, num_warps=8, num_stages=1, **shape)
    return output


def _prefill_tiles(dtype: torch.dtype, size: int) -> tuple[int, int, str]:
    """(elements of a head, tokens of a chunk, precision of products). tf32 has more digits than the bfloat16 or float16 that comes in
    and goes out; float32 stays float32, without matrix units."""
    if dtype == torch.float32:
        return 16, 16, "ieee"
    return 32, 32 if size <= 128 else 16, "tf32"


def _block(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """What belongs to one token [1, T, ...] lies together; tokens may be any distance apart."""
    wanted = 1
    for extent, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if extent != 1 and stride != wanted:
            return tensor.contiguous()
        wanted *= extent
    return tensor


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
