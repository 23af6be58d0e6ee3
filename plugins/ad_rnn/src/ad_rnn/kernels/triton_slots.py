"""Recurrences by channel over states in slots in Triton: what the core must know to choose them. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api import AdError, Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op

_STATE = "Tensor(a!) state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"
RG_LRU_SCHEMA = f"ad_rnn::rg_lru_triton(Tensor x, Tensor gate, {_STATE}"
WKV4_SCHEMA = f"ad_rnn::wkv4_triton(Tensor key, Tensor value, Tensor time_decay, Tensor time_first, {_STATE}"
TOKEN_SHIFT_SCHEMA = f"ad_rnn::token_shift_triton(Tensor x, {_STATE}"
"""The canonical arguments on packed tokens [1, T, D]; read and write the step's slots of `state` ([slots, D], or [slots, 3, D] of `wkv4`).
Return [1, T, D], contiguous; rows past `cu_seqlens[B]` are zero."""


def _rg_lru(x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    return _launches(x).rg_lru(x, *arguments)


def _wkv4(key: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    return _launches(key).wkv4(key, *arguments)


def _token_shift(x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    return _launches(x).token_shift(x, *arguments)


def _launches(tokens: torch.Tensor) -> Any:
    # Here and not above: a machine without triton can still list these kernels and read why they are not used.
    from ad_rnn.kernels import triton_launch

    if tokens.device.type == "cpu" and not triton_launch.INTERPRET.value:
        raise AdError(
            "a Triton kernel was given CPU tensors",
            where="ad_rnn",
            why="Triton compiles for GPUs; on the CPU its interpreter must be on before the kernels are imported",
            hint="set TRITON_INTERPRET=1 before the process starts, or choose another kernel",
        )
    return triton_launch


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


def _wkv4_fake(key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


rg_lru_triton = define_op(RG_LRU_SCHEMA, _rg_lru, _fake)
wkv4_triton = define_op(WKV4_SCHEMA, _wkv4, _wkv4_fake)
token_shift_triton = define_op(TOKEN_SHIFT_SCHEMA, _token_shift, _fake)


class _TritonChannels(Kernel):
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
        return None


class TritonRgLru(_TritonChannels):
    name = "rnn.rg_lru.triton"
    target = "ad_rnn::rg_lru"
    op = "ad_rnn::rg_lru_triton"


class TritonWkv4(_TritonChannels):
    name = "rnn.wkv4.triton"
    target = "ad_rnn::wkv4"
    op = "ad_rnn::wkv4_triton"


class TritonTokenShift(_TritonChannels):
    name = "rnn.token_shift.triton"
    target = "ad_rnn::token_shift"
    op = "ad_rnn::token_shift_triton"
