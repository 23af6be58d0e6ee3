"""Delta rules over states in slots in Triton: what the core must know to choose them. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op

_REST = "Tensor beta, float scale, bool l2norm, Tensor(a!) state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"
GATED_SCHEMA = f"ad_deltanet::gated_delta_triton(Tensor query, Tensor key, Tensor value, Tensor? g, {_REST}"
KDA_SCHEMA = f"ad_deltanet::kda_triton(Tensor query, Tensor key, Tensor value, Tensor g, {_REST}"
"""The canonical arguments on packed tokens (query [1, T, H, K], value [1, T, Hv, V]); reads and writes the step's slots of `state`
[slots, Hv, K, V], float32. Returns [1, T, Hv, V], contiguous, of value's dtype; rows past `cu_seqlens[B]` are zero."""

MAX_KEY_DIM = 128


def _delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    l2norm: bool,
    state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
) -> torch.Tensor:
    # Here and not above: a machine without triton can still list these kernels and read why they are not used.
    from ad_deltanet.kernels import triton_launch

    if query.device.type == "cpu" and not triton_launch.INTERPRET.value:
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_deltanet",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    places: dict[str, Any] = {"state": state, "cu_seqlens": cu_seqlens, "state_slots": state_slots, "fresh": fresh}
    return triton_launch.delta_rule(query, key, value, g, beta, scale=scale, l2norm=l2norm, **places)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


gated_delta_triton = define_op(GATED_SCHEMA, _delta, _fake)
kda_triton = define_op(KDA_SCHEMA, _delta, _fake)


class _TritonDelta(Kernel):
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


class TritonGatedDelta(_TritonDelta):
    name = "deltanet.gated_delta.triton"
    target = "ad_deltanet::gated_delta"
    op = "ad_deltanet::gated_delta_triton"


class TritonKda(_TritonDelta):
    name = "deltanet.kda.triton"
    target = "ad_deltanet::kda"
    op = "ad_deltanet::kda_triton"
