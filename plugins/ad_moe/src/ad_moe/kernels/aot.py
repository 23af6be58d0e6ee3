"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`: sizes, layouts and gates in use.

python -m ad_core.testing.triton_budget ad_moe.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_moe.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ad_moe.gating import Gating
from ad_moe.kernels.triton_launch import experts, linear

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CLAMPED = Gating(layout="interleaved", alpha=1.702, limit=7.0, offset=1.0)


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16-decode": partial(_step, BF16, tokens=4),
        "bf16-chunk": partial(_step, BF16, tokens=64),
        "bf16-prefill": partial(_step, BF16, tokens=512),
        "bf16-prefill-interleaved": partial(_step, BF16, tokens=512, gating=CLAMPED, bias=True, transposed=True),
        "bf16-decode-interleaved": partial(_step, BF16, tokens=4, gating=CLAMPED, bias=True, transposed=True),
        "bf16-prefill-ungated": partial(_step, BF16, tokens=512, gating=Gating("relu2", "none")),
        "bf16-prefill-odd": partial(_step, BF16, tokens=512, depth=200, inner=104),
        "fp16-prefill": partial(_step, FP16, tokens=512),
        "fp32-decode": partial(_step, FP32, tokens=4),
        "fp32-prefill": partial(_step, FP32, tokens=512),
        "bf16-linear-decode": partial(_linear, BF16, tokens=4),
        "bf16-linear-prefill": partial(_linear, BF16, tokens=512),
        "fp32-linear-prefill": partial(_linear, FP32, tokens=512),
    }


def _step(
    dtype: torch.dtype,
    *,
    tokens: int,
    depth: int = 512,
    inner: int = 256,
    gating: Gating | None = None,
    bias: bool = False,
    transposed: bool = False,
) -> torch.Tensor:
    """Eight experts, two of them for each token, on tensors whose contents nobody reads."""
    gating = gating or Gating()
    wide = inner if gating.layout == "none" else 2 * inner
    floats: Any = partial(torch.zeros, dtype=dtype)
    up, down = floats(8, wide, depth), floats(8, depth, inner)
    if transposed:
        up, down = floats(8, depth, wide), floats(8, inner, depth)
    up_bias, down_bias = (floats(8, wide), floats(8, depth)) if bias else (None, None)
    selected = torch.zeros(1, tokens, 2, dtype=torch.int64)
    return experts(
        floats(1, tokens, depth),
        selected,
        torch.zeros(1, tokens, 2),
        up,
        down,
        None,
        up_bias,
        down_bias,
        transposed,
        transposed,
        False,
        gating,
    )


def _linear(dtype: torch.dtype, *, tokens: int, depth: int = 512, width: int = 256) -> torch.Tensor:
    """Likewise, of one projection."""
    floats: Any = partial(torch.zeros, dtype=dtype)
    return linear(floats(1, tokens, depth), torch.zeros(1, tokens, 2, dtype=torch.int64), floats(8, width, depth))
