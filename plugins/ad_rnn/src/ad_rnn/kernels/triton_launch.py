"""The host side of the Triton kernels. Shapes decide what is launched, never the contents of a tensor.

Importing this module needs triton; `triton_slots` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from ad_rnn.kernels.triton_channels import rg_lru_kernel, token_shift_kernel, wkv4_kernel
from ad_rnn.wkv4 import NO_PEAK

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Decided when kernels are imported: set TRITON_INTERPRET before."""

BLOCK = 128
"""Channels of a program: few, since a model's width is all the parallelism that there is in one sequence."""


def rg_lru(x: torch.Tensor, gate: torch.Tensor, *state_and_places: torch.Tensor) -> torch.Tensor:
    """The bodies of the cached ops; shapes and mutation are told in `triton_slots`."""
    return _run(rg_lru_kernel, x, (x.contiguous(), gate.contiguous(), *state_and_places))


def wkv4(
    key: torch.Tensor, value: torch.Tensor, time_decay: torch.Tensor, time_first: torch.Tensor, *state_and_places: torch.Tensor
) -> torch.Tensor:
    parameters = (time_decay.contiguous(), time_first.contiguous())
    return _run(wkv4_kernel, value, (key.contiguous(), value.contiguous(), *parameters, *state_and_places, NO_PEAK))


def token_shift(x: torch.Tensor, *state_and_places: torch.Tensor) -> torch.Tensor:
    return _run(token_shift_kernel, x, (x.contiguous(), *state_and_places))


def _run(kernel: Any, like: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    output = like.new_zeros(like.shape)  # rows of padding stay so
    _, T, D = like.shape
    sequences = next(x.shape[0] for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.bool)  # `fresh`
    if T and sequences:
        with _device(like):
            kernel[(sequences, -(-D // BLOCK))](output, *arguments, D=D, BLOCK_D=BLOCK, num_warps=4, enable_fp_fusion=True)
    return output


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
