"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`.

python -m ad_core.testing.triton_budget ad_conv.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_conv.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ad_conv.kernels.triton_launch import causal_conv1d

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16 = torch.float32, torch.bfloat16


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16-k4": partial(_step, BF16),
        "bf16-k4-decode": partial(_step, BF16, T=3),
        "bf16-k3-plain": partial(_step, BF16, K=3, bias=False, activation=""),
        "fp32-k4": partial(_step, FP32),
        "bf16-k4-odd": partial(_step, BF16, C=1793),
    }


def _step(dtype: torch.dtype, *, C: int = 1792, K: int = 4, T: int = 200, bias: bool = True, activation: str = "silu") -> torch.Tensor:
    """One step of three sequences (T = 3: of pure decode), on tensors whose contents nobody reads."""
    floats, B = partial(torch.zeros, dtype=dtype), 3
    places = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B, dtype=torch.int32), torch.zeros(B, dtype=torch.bool)
    return causal_conv1d(floats(1, T, C), floats(C, K), floats(C) if bias else None, activation, floats(2, K - 1, C), *places)
