"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`: dtypes and head sizes in use.

python -m ad_core.testing.triton_budget ad_linear.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_linear.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from ad_linear.kernels.triton_launch import lightning, mlstm

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16 = torch.float32, torch.bfloat16


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "lightning-bf16-d128": partial(_lightning, BF16, 128),
        "lightning-bf16-d128-decode": partial(_lightning, BF16, 128, T=1),
        "lightning-fp32-d64": partial(_lightning, FP32, 64),
        "mlstm-bf16-k128-v256": partial(_mlstm, BF16, 128, 256),
        "mlstm-fp32-k64-v128": partial(_mlstm, FP32, 64, 128),
    }


def _places(T: int) -> tuple[torch.Tensor, ...]:
    B = min(T, 3)
    integers = partial(torch.zeros, dtype=torch.int32)
    return integers(B + 1), integers(B), torch.zeros(B, dtype=torch.bool)


def _lightning(dtype: torch.dtype, D: int, *, H: int = 64, T: int = 200) -> torch.Tensor:
    """One step, on tensors whose contents nobody reads."""
    x = torch.zeros(1, T, H, D, dtype=dtype)
    return lightning(x, x, x, torch.zeros(H), 1.0, torch.zeros(2, H, D, D), *_places(T))


def _mlstm(dtype: torch.dtype, K: int, V: int, *, H: int = 8, T: int = 200) -> torch.Tensor:
    key, value, gate = (torch.zeros(1, T, H, *size, dtype=dtype) for size in ((K,), (V,), ()))
    return mlstm(key, key, value, gate, gate, 0.1, 1e-6, torch.zeros(2, H, K, V + 1), torch.zeros(2, H), *_places(T))
