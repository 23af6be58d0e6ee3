"""Routed experts as grouped products in Triton: what the core must know to choose them. Needs triton only when run."""

from __future__ import annotations

import os
from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op
from ad_moe.gating import Gating
from ad_moe.linear import LINEAR_ARGUMENTS, linear_fake
from ad_moe.op import ARGUMENTS, moe_fake


class _TritonGrouped(Kernel):
    """Every launch depends on shapes only, so a CUDA graph may hold any step."""

    priority = 100
    requires = ("triton>=3.6",)
    graph = "full"
    multiplied: tuple[str, ...]
    """The arguments whose dtypes must agree."""

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if environment.device == "cpu" and not environment.interpret:
            return Declined("Triton kernels run on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)")
        if environment.capability is not None and environment.capability < (8, 0):
            found = ".".join(map(str, environment.capability))
            return Declined(f"needs compute capability 8.0 (bfloat16 matrix units), the device has {found}")
        dtypes = {str(call[name].dtype).removeprefix("torch.") for name in self.multiplied}
        return Declined(f"tokens and weights are of different dtypes ({', '.join(sorted(dtypes))})") if len(dtypes) > 1 else None


class TritonExperts(_TritonGrouped):
    """Two products: what is between them is fused to the first, the router's weight to the second."""

    name = "moe.triton"
    target = "ad_moe::moe"
    op = "ad_moe::moe_triton"
    multiplied = ("tokens", "up", "down")

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if (declined := super().supports(call, environment)) is not None:
            return declined
        if call["norm"] is not None:
            return Declined("a norm behind the experts needs whole rows, and a program has part of them")
        return None


class TritonRoutedLinear(_TritonGrouped):
    """The second of these products, alone."""

    name = "moe.linear.triton"
    target = "ad_moe::routed_linear"
    op = "ad_moe::routed_linear_triton"
    multiplied = ("tokens", "weight")


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
    return _launches(tokens).experts(
        tokens, selected, weights, up, down, gate, up_bias, down_bias, up_transposed, down_transposed, weigh_input, Gating(*gating)
    )


def routed_linear_triton(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`ad_moe::routed_linear` on packed tokens [1, T, D] or [1, T, K, D]. See there for the arguments."""
    return _launches(tokens).linear(tokens, selected, weight)


def _launches(tokens: torch.Tensor) -> Any:
    if tokens.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_moe",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    # Here and not above: a machine without triton can still list these kernels and read why they are not used.
    from ad_moe.kernels import triton_launch

    return triton_launch


define_op(f"ad_moe::moe_triton({ARGUMENTS.format(star='')}) -> Tensor", moe_triton, moe_fake)
define_op(f"ad_moe::routed_linear_triton({LINEAR_ARGUMENTS}) -> Tensor", routed_linear_triton, linear_fake)
