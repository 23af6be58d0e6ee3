"""What every launch of a Triton kernel needs on the host. Importing this module needs triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton

from ad_attention.kernels.triton_ops import INTERPRET

FP_FUSION = {"enable_fp_fusion": True}
"""Said aloud, because Triton's default changes between releases."""


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, whose last dimension lies element by element."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run side by side: asked of Triton's driver, so that a stand-in for a GPU can answer. One in the interpreter."""
    if INTERPRET.value:
        return 1
    count: int = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"]
    return count
