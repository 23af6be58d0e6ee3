"""SSD over slots on the CPU, in C (`native_ssd.c`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from ad_core.api import BufferSpec, Declined, Environment, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import Step, plan_buffers
from ad_core.native import NativeLibrary
from ad_mamba.kernels.torch_ssd import TorchSSD

LIBRARY = NativeLibrary(Path(__file__).with_name("native_ssd.c"))

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_mamba::ssd_native(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float dt_min, float? dt_max, Tensor(a!) ssm_state, Tensor plan, Tensor records) -> Tensor"
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
    plan: torch.Tensor,
    records: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, H, P] -> [1, T, H, P].

    Reads and writes the states [slots, H, P, N] of the step's sequences. Rows past the batch's tokens are zero.
    """
    step, (_, T, H, P), (G, N) = Step(*plan.tolist()), x.shape, B.shape[2:]
    out = x.new_empty(x.shape)
    x_, B_, C_, z_ = _rows(x), _rows(B), _rows(C), None if z is None else _rows(z)
    A_, D_, bias = A.float().contiguous(), None if D is None else D.float(), None if dt_bias is None else dt_bias.float().contiguous()
    _function(x.dtype)(
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
        records.data_ptr(),
        step.decodes,
        step.prefills,
        out.data_ptr(),
        step.tokens,
        T,
        H,
        P,
        G,
        N,
    )
    return out


def _rows(value: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, as the parts of a split projection do; what is inside of one [1, T, H, P] may not."""
    return value if value[0, 0].is_contiguous() else value.contiguous()


@cache
def _function(dtype: torch.dtype) -> Callable[..., None]:
    return LIBRARY.function("ssd", "pipiippipipiipipiffppiipiiiiii", dtype)


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


ssd_native = define_op(SCHEMA, _ssd, _fake)


class NativeSSD(TorchSSD):
    """A decode's state is read once and written once, where it lies; a prompt goes through it in blocks, as products of small matrices."""

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
