"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`.

python -m ad_core.testing.triton_budget ad_rnn.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_rnn.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ad_rnn.kernels import triton_launch

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16 = torch.float32, torch.bfloat16


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16": partial(_step, BF16),
        "fp32": partial(_step, FP32),
        "bf16-odd": partial(_step, BF16, D=2561),
    }


def _step(dtype: torch.dtype, *, D: int = 2560, T: int = 200) -> None:
    """One step of each op, on tensors whose contents nobody reads."""
    x, channel, B = torch.zeros(1, T, D, dtype=dtype), torch.zeros(D), 3
    places = torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B, dtype=torch.int32), torch.zeros(B, dtype=torch.bool)
    triton_launch.rg_lru(x, x, torch.zeros(2, D), *places)
    triton_launch.wkv4(x, x, channel, channel, torch.zeros(2, 3, D), *places)
    triton_launch.token_shift(x, torch.zeros(2, D, dtype=dtype), *places)
