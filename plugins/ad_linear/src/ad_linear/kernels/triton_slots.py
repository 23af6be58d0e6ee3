"""Linear attention over states in slots in Triton: what the core must know to choose it. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op

_PLACES = "Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"
LIGHTNING_SCHEMA = (
    f"ad_linear::lightning_triton(Tensor query, Tensor key, Tensor value, Tensor log_decay, float scale, Tensor(a!) state, {_PLACES}"
)
MLSTM_SCHEMA = (
    "ad_linear::mlstm_triton(Tensor query, Tensor key, Tensor value, Tensor input_gate, Tensor forget_gate, float scale, float eps, "
    f"Tensor(a!) memory, Tensor(b!) peak, {_PLACES}"
)
"""The canonical arguments on packed tokens (query [1, T, H, K], value [1, T, H, V]); read and write the step's slots of `state`
[slots, H, K, V], or of `memory` [slots, H, K, V + 1] and `peak` [slots, H], float32. Return [1, T, H, V], contiguous, of value's
dtype; rows past `cu_seqlens[B]` are zero."""

MAX_KEY_DIM = 128


def _lightning(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _launches(query).lightning(query, *arguments)


def _mlstm(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return _launches(query).mlstm(query, *arguments)


def _launches(query: torch.Tensor) -> Any:
    # Here and not above: a machine without triton can still list these kernels and read why they are not used.
    from ad_linear.kernels import triton_launch

    if query.device.type == "cpu" and not triton_launch.INTERPRET.value:
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_linear",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    return triton_launch


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


lightning_triton = define_op(LIGHTNING_SCHEMA, _lightning, _fake)
mlstm_triton = define_op(MLSTM_SCHEMA, _mlstm, _fake)


class _TritonLinear(Kernel):
    """One program for a head's state, or a part of its columns. Every launch depends on shapes only, so a CUDA graph may hold any step."""

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
        if int(call["key"].shape[3]) > MAX_KEY_DIM:
            return Declined(f"keys of {int(call['key'].shape[3])} do not fit the registers; {MAX_KEY_DIM} is the largest")
        return None


class TritonLightning(_TritonLinear):
    name = "linear.lightning.triton"
    target = "ad_linear::lightning"
    op = "ad_linear::lightning_triton"


class TritonMLstm(_TritonLinear):
    name = "linear.mlstm.triton"
    target = "ad_linear::mlstm"
    op = "ad_linear::mlstm_triton"
