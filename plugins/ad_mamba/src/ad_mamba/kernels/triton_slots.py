"""Both recurrences over slots in Triton: what the core must know to choose them. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op
from ad_mamba.op import scan, ssd

_STATE = "Tensor(a!) ssm_state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"
SCAN_SCHEMA = (
    "ad_mamba::selective_scan_triton(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    f"bool delta_softplus, {_STATE}"
)
SSD_SCHEMA = (
    "ad_mamba::ssd_triton(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    f"float dt_min, float? dt_max, {_STATE}"
)
"""The canonical arguments on packed tokens [1, T, ...]; read and write the step's slots of `ssm_state` ([slots, D, N] of the scan,
[slots, H, P, N] of SSD). Return the first argument's shape, contiguous; rows past `cu_seqlens[B]` are zero."""

MAX_STATE_SIZE = 256


def _selective_scan(u: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _launches(u).selective_scan(u, *arguments)


def _ssd(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _launches(x).ssd(x, *arguments)


def _launches(tokens: torch.Tensor) -> Any:
    # Here and not above: a machine without triton can still list these kernels and read why they are not used.
    from ad_mamba.kernels import triton_launch

    if tokens.device.type == "cpu" and not triton_launch.INTERPRET.value:
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_mamba",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    return triton_launch


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


selective_scan_triton = define_op(SCAN_SCHEMA, _selective_scan, _fake)
ssd_triton = define_op(SSD_SCHEMA, _ssd, _fake)


class _TritonSlots(Kernel):
    """Every launch depends on shapes only, so a CUDA graph may hold any step."""

    priority = 100
    devices = frozenset({"cuda", "cpu"})
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if environment.device == "cpu" and not environment.interpret:
            return Declined("Triton kernels run on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)")
        if environment.capability is not None and environment.capability < (8, 0):
            found = ".".join(map(str, environment.capability))
            return Declined(f"needs compute capability 8.0 (bfloat16), the device has {found}")
        size = int(call["B"].shape[-1])
        if size > MAX_STATE_SIZE:
            return Declined(f"a state of {size} does not fit the registers; {MAX_STATE_SIZE} is the largest")
        return None


class TritonScan(_TritonSlots):
    name = "mamba.scan.triton"
    target = scan.OP
    op = "ad_mamba::selective_scan_triton"


class TritonSSD(_TritonSlots):
    name = "mamba.ssd.triton"
    target = ssd.OP
    op = "ad_mamba::ssd_triton"
