"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`: the sizes of published models.

python -m ad_core.testing.triton_budget ad_mamba.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_mamba.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ad_mamba.kernels import triton_launch

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16 = torch.float32, torch.bfloat16


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16-scan": partial(_scan, BF16),
        "fp32-scan": partial(_scan, FP32),
        "bf16-ssd-n128": partial(_ssd, BF16),
        "bf16-ssd-n128-decode": partial(_ssd, BF16, T=3),
        "bf16-ssd-n256": partial(_ssd, BF16, N=256, G=1),
        "bf16-ssd-n64-gated": partial(_ssd, BF16, N=64, gated=True),
        "fp32-ssd-n128": partial(_ssd, FP32),
    }


def _places(B: int) -> tuple[torch.Tensor, ...]:
    return torch.zeros(B + 1, dtype=torch.int32), torch.zeros(B, dtype=torch.int32), torch.zeros(B, dtype=torch.bool)


def _scan(dtype: torch.dtype, *, D: int = 1536, N: int = 16, T: int = 200) -> torch.Tensor:
    """One step of three sequences, on tensors whose contents nobody reads."""
    x, state, channel = torch.zeros(1, T, D, dtype=dtype), torch.zeros(1, T, N, dtype=dtype), torch.zeros(D)
    return triton_launch.selective_scan(x, x, torch.zeros(D, N), state, state, channel, x, channel, True, torch.zeros(2, D, N), *_places(3))


def _ssd(dtype: torch.dtype, *, H: int = 24, P: int = 64, N: int = 128, G: int = 8, T: int = 200, gated: bool = False) -> torch.Tensor:
    """Likewise (T = 3: pure decode)."""
    x, state, head = torch.zeros(1, T, H, P, dtype=dtype), torch.zeros(1, T, G, N, dtype=dtype), torch.zeros(H, dtype=dtype)
    gate, high = (x, 0.1) if gated else (None, None)
    steps, states = torch.zeros(1, T, H, dtype=dtype), torch.zeros(2, H, P, N)
    return triton_launch.ssd(x, steps, torch.zeros(H), state, state, head, gate, head, True, 0.0, high, states, *_places(3))
