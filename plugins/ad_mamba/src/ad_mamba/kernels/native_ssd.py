"""SSD over slots on the CPU: decodes in C (`native_ssd.c`), prompts in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from ad_core.api import BufferSpec, Declined, Environment, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import plan_buffers, read_plan
from ad_core.native import NativeLibrary
from ad_mamba.kernels.torch_ssd import TorchSSD, prompts

LIBRARY = NativeLibrary(Path(__file__).with_name("native_ssd.c"))

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_mamba::ssd_native(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float dt_min, float? dt_max, Tensor(a!) ssm_state, Tensor state_slots, Tensor fresh, Tensor plan, Tensor records) -> Tensor"
)


def _ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    ssm_state: torch.Tensor,
    state_slots: torch.Tensor,
    fresh: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, H, P] -> [1, T, H, P].

    Reads and writes the states [slots, H, P, N] of the step's sequences. Rows past the batch's tokens are zero.
    """
    (step, chunks), (_, T, H, P), (G, N) = read_plan(plan, records), x.shape, B.shape[2:]
    if not step.decodes:
        return prompts(step, chunks, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, ssm_state)
    out = x.new_empty(x.shape)
    x_, B_, C_, z_ = _rows(x), _rows(B), _rows(C), None if z is None else _rows(z)
    A_, D_, bias = A.float().contiguous(), None if D is None else D.float(), None if dt_bias is None else dt_bias.float().contiguous()
    _decode(x.dtype)(
        x_.data_ptr(),
        x_.stride(1),
        dt.data_ptr(),
        dt.stride(1),
        dt.stride(2),
        A_.data_ptr(),
        B_.data_ptr(),
        B_.stride(1),
        C_.data_ptr(),
        C_.stride(1),
        0 if D_ is None else D_.data_ptr(),
        0 if D_ is None else D_.stride(0),
        D_.stride(1) if D_ is not None and D_.dim() == 2 else 0,
        0 if z_ is None else z_.data_ptr(),
        0 if z_ is None else z_.stride(1),
        0 if bias is None else bias.data_ptr(),
        dt_softplus,
        dt_min,
        math.inf if dt_max is None else dt_max,
        ssm_state.data_ptr(),
        state_slots.data_ptr(),
        fresh.data_ptr(),
        out.data_ptr(),
        step.decodes,
        H,
        P,
        G,
        N,
    )
    if step.decodes < T:
        out[:, step.decodes :] = prompts(step, chunks, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, ssm_state)
    return out


def _rows(value: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, as the parts of a split projection do; what is inside of one [1, T, H, P] may not."""
    return value if value[0, 0].is_contiguous() else value.contiguous()


@cache
def _decode(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("ssd_decode", "pipiippipipiipipiffppppiiiii", dtype)


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


ssd_native = define_op(SCHEMA, _ssd, _fake)


class NativeSSD(TorchSSD):
    """Every state of a decode is read once and written once, where it lies, by C that is compiled for this CPU."""

    name = "mamba.ssd.native"
    op = "ad_mamba::ssd_native"
    priority = 50
    devices = frozenset({"cpu"})
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        dtypes = {call[name].dtype for name in ("x", "dt", "B", "C", "z") if call[name] is not None}
        if len(dtypes) > 1:
            return Declined(f"its tokens are of several dtypes ({', '.join(sorted(map(str, dtypes)))})")
        return super().supports(call, environment) or LIBRARY.declined(call["x"].dtype)

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits, host_only=True)
