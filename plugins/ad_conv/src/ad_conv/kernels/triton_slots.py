"""The causal convolution over slots in Triton: what the core must know to choose it. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_conv.op import ACTIVATIONS, OP
from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_conv::causal_conv1d_triton(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor(a!)? conv_state, Tensor cu_seqlens, "
    "Tensor state_slots, Tensor fresh) -> Tensor"
)
"""The canonical arguments on packed tokens [1, T, C]; reads and writes the step's slots of `conv_state` [slots, K - 1, C], None if K
is 1. Returns [1, T, C], contiguous; rows past `cu_seqlens[B]` are zero."""


def _causal_conv1d(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_conv.kernels import triton_launch

    if x.device.type == "cpu" and not triton_launch.INTERPRET.value:
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_conv::causal_conv1d_triton",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    return triton_launch.causal_conv1d(x, *arguments)


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


causal_conv1d_triton = define_op(SCHEMA, _causal_conv1d, _fake)


class TritonSlots(Kernel):
    """Every launch depends on shapes only, so a CUDA graph may hold any step."""

    name = "conv.causal.triton"
    target = OP
    op = "ad_conv::causal_conv1d_triton"
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
        if call["activation"] not in ACTIVATIONS:
            return Declined(f"it has no activation {call['activation']!r}")
        return None
