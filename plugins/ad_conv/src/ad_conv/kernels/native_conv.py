"""The causal convolution over slots on the CPU: decodes in C (`native_conv.c`), prompts in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from ad_conv.kernels.torch_ref import TorchSlots, prompts
from ad_core.api import BufferSpec, Declined, Environment, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import plan_buffers, read_plan
from ad_core.native import NativeLibrary

LIBRARY = NativeLibrary(Path(__file__).with_name("native_conv.c"))
MAX_TAPS = 16

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_conv::causal_conv1d_native(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor(a!) conv_state, Tensor state_slots, "
    "Tensor fresh, Tensor plan, Tensor records) -> Tensor"
)


def _causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    conv_state: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, C] -> [1, T, C].

    Reads and writes the states [slots, K - 1, C] of the step's sequences. Rows past the batch's tokens are zero.
    """
    (step, chunks), (_, T, C) = read_plan(plan, records), x.shape
    if not step.decodes:
        return prompts(step, chunks, x, weight, bias, activation, conv_state)
    out = x.new_empty(x.shape)
    rows = x if x.stride(2) == 1 else x.contiguous()
    taps, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _decode(x.dtype)(
        rows.data_ptr(),
        rows.stride(1),
        taps.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        conv_state.data_ptr(),
        state_slots.data_ptr(),
        fresh.data_ptr(),
        out.data_ptr(),
        step.decodes,
        C,
        weight.shape[1],
        activation == "silu",
    )
    if step.decodes < T:
        out[:, step.decodes :] = prompts(step, chunks, x, weight, bias, activation, conv_state)
    return out


@cache
def _decode(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("conv_decode", "pippppppiiii", dtype)


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


causal_conv1d_native = define_op(SCHEMA, _causal_conv1d, _fake)


class NativeSlots(TorchSlots):
    """The state of a decode moves on where it lies, in C that is compiled for this CPU."""

    name = "conv.causal.native"
    op = "ad_conv::causal_conv1d_native"
    priority = 50
    devices = frozenset({"cpu"})
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        taps = int(call["weight"].shape[1])
        if not 1 < taps <= MAX_TAPS:
            return Declined(f"it has 2 to {MAX_TAPS} taps, not {taps}")
        tensors = [call[name] for name in ("x", "weight", "bias") if call[name] is not None]
        if len({tensor.dtype for tensor in tensors}) > 1:
            return Declined("tokens and weights are of different dtypes")
        return super().supports(call, environment) or LIBRARY.declined(call["x"].dtype)

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits, host_only=True)
