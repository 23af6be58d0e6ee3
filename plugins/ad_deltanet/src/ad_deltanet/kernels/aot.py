"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`: dtypes, head sizes and gates in use.

python -m ad_core.testing.triton_budget ad_deltanet.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_deltanet.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ad_deltanet.kernels.triton_launch import delta_rule

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16-gated-d128": partial(_step, BF16, 128),
        "bf16-kda-d128": partial(_step, BF16, 128, channels=True, H=32),
        "bf16-plain-d64": partial(_step, BF16, 64, gated=False),
        "bf16-gated-k96-v192": partial(_step, BF16, 96, V=192, H=30, HV=30),
        "fp16-gated-d128": partial(_step, FP16, 128),
        "fp32-gated-d128": partial(_step, FP32, 128),
        "fp32-kda-d64": partial(_step, FP32, 64, channels=True, H=32),
    }


def _step(
    dtype: torch.dtype, K: int, *, V: int = 0, H: int = 16, HV: int = 32, T: int = 200, gated: bool = True, channels: bool = False
) -> torch.Tensor:
    """One mixed step of three sequences, on tensors whose contents nobody reads."""
    V, B = V or K, 3
    floats, integers = partial(torch.zeros, dtype=dtype), partial(torch.zeros, dtype=torch.int32)
    g = floats(1, T, HV, K) if channels else torch.zeros(1, T, HV)
    return delta_rule(
        floats(1, T, H, K),
        floats(1, T, H, K),
        floats(1, T, HV, V),
        g if gated else None,
        floats(1, T, HV),
        scale=0.1,
        l2norm=True,
        state=torch.zeros(2, HV, K, V),
        cu_seqlens=integers(B + 1),
        state_slots=integers(B),
        fresh=torch.zeros(B, dtype=torch.bool),
    )
