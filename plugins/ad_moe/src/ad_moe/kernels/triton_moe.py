"""Routed experts as two fused grouped products in Triton: what the core must know to choose them. Needs triton only when run."""

from __future__ import annotations

import os
from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op
from ad_moe.gating import Gating
from ad_moe.op import ARGUMENTS, moe_fake


class TritonExperts(Kernel):
    """Every launch depends on shapes only, so a CUDA graph may hold any step."""

    name = "moe.triton"
    target = "ad_moe::moe"
    op = "ad_moe::moe_triton"
    priority = 100
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if environment.device == "cpu" and not environment.interpret:
            return Declined("Triton kernels run on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)")
        if environment.capability is not None and environment.capability < (8, 0):
            found = ".".join(map(str, environment.capability))
            return Declined(f"needs compute capability 8.0 (bfloat16 matrix units), the device has {found}")
        if call["norm"] is not None:
            return Declined("a norm behind the experts needs whole rows, and a program has part of them")
        dtypes = {str(call[name].dtype).removeprefix("torch.") for name in ("tokens", "up", "down")}
        return Declined(f"tokens and weights are of different dtypes ({', '.join(sorted(dtypes))})") if len(dtypes) > 1 else None


def moe_triton(
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    up_transposed: bool = False,
    down_transposed: bool = False,
    weigh_input: bool = False,
    *gating: Any,
) -> torch.Tensor:
    """`ad_moe::moe` on packed tokens [1, T, D]. See there for the arguments."""
    if tokens.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_moe::moe_triton",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_moe.kernels import triton_launch

    return triton_launch.experts(
        tokens, selected, weights, up, down, gate, up_bias, down_bias, up_transposed, down_transposed, weigh_input, Gating(*gating)
    )


define_op(f"ad_moe::moe_triton({ARGUMENTS.format(star='')}) -> Tensor", moe_triton, moe_fake)
