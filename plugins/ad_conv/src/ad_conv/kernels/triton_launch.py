"""The host side of the Triton kernels. Shapes decide what is launched, never the contents of a tensor.

Importing this module needs triton; `triton_slots` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from ad_conv.kernels.triton_conv import prefill_kernel, update_kernel

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Decided when kernels are imported: set TRITON_INTERPRET before."""

UPDATE_CHANNELS, PREFILL_TOKENS, PREFILL_CHANNELS = 256, 16, 128
"""Tiles: from what fits registers when compiled for sm_90, not from measurements."""


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    conv_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    """The body of the cached op; shapes and mutation are told in `triton_slots`."""
    x = x if x.stride(2) == 1 else x.contiguous()
    _, T, C = x.shape
    B, K = state_slots.shape[0], weight.shape[1]
    output = x.new_zeros(x.shape)  # rows of padding stay so
    if T == 0 or B == 0:
        return output
    tensors = (output, x, weight.contiguous(), None if bias is None else bias.contiguous(), conv_state, cu_seqlens, state_slots, fresh)
    shape = {"C": C, "K": K, "SILU": activation == "silu", "enable_fp_fusion": True}
    long = T > B  # some sequence has several tokens
    with _device(x):
        if long:
            grid = (-(-T // PREFILL_TOKENS) + B, -(-C // PREFILL_CHANNELS))
            prefill_kernel[grid](*tensors, B, x.stride(1), BLOCK_T=PREFILL_TOKENS, BLOCK_C=PREFILL_CHANNELS, num_warps=4, **shape)
        if K > 1 or not long:
            grid = (B, -(-C // UPDATE_CHANNELS))
            update_kernel[grid](*tensors, x.stride(1), WRITE_OUTPUT=not long, BLOCK_C=UPDATE_CHANNELS, num_warps=4, **shape)
    return output


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
