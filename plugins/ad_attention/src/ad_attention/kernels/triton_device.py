"""Where the Triton kernels run. Imports no triton: a machine without it can still list them and read why they are not used."""

from __future__ import annotations

import os

import torch

from ad_core.api import AdError, Declined, Environment


def unsupported(environment: Environment) -> Declined | None:
    """Why no Triton kernel of this package runs there, or None."""
    if environment.device == "cpu" and not environment.interpret:
        return Declined("Triton kernels run on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)")
    if environment.capability is not None and environment.capability < (8, 0):
        found = ".".join(map(str, environment.capability))
        return Declined(f"needs compute capability 8.0 (bfloat16 matrix units), the device has {found}")
    return None


def refuse_cpu(tensor: torch.Tensor, op: str) -> None:
    """Raises `AdError` if the kernel would have to be compiled for a CPU."""
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where=op,
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
