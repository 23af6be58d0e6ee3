"""The launches that are compiled ahead for sm_90 and held against `aot_budget.json`: dtypes, head sizes and modifiers in use.

python -m ad_core.testing.triton_budget ad_attention.kernels.aot            compares
python -m ad_core.testing.triton_budget ad_attention.kernels.aot --write    takes what is measured as the new budget
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ad_attention.kernels.triton_launch import attention
from ad_attention.kernels.triton_tiles import num_splits

BUDGET = Path(__file__).with_name("aot_budget.json")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ALL = ("softcap", "sinks", "alibi_slopes", "rel_bias", "key_bias", "window")


def variants() -> Mapping[str, Callable[[], object]]:
    """Calls by name. Under `ad_core.testing.triton.compiled_launches` each compiles the kernels of one step."""
    return {
        "bf16-d64": partial(_step, BF16, 64),
        "bf16-d128": partial(_step, BF16, 128),
        "bf16-d128-decode": partial(_step, BF16, 128, T=3),
        "bf16-d128-mha": partial(_step, BF16, 128, G=32),
        "bf16-d128-mqa": partial(_step, BF16, 128, H=64, G=1),
        "bf16-d128-all": partial(_step, BF16, 128, modifiers=ALL),
        "bf16-d128-own": partial(_step, BF16, 128, modifiers=("distance_bias", "query_sinks")),
        "bf16-d64-window-sinks": partial(_step, BF16, 64, H=64, modifiers=("window", "sinks"), max_keys=128),
        "bf16-d80": partial(_step, BF16, 80, G=32),
        "bf16-d192-dv128": partial(_step, BF16, 192, DV=128, G=32),
        "bf16-d256-window-softcap": partial(_step, BF16, 256, H=16, modifiers=("window", "softcap")),
        "fp16-d128": partial(_step, FP16, 128),
        "fp32-d64-all": partial(_step, FP32, 64, modifiers=ALL),
        "fp32-d128": partial(_step, FP32, 128),
        "fp32-d256": partial(_step, FP32, 256),
    }


def _step(
    dtype: torch.dtype, D: int, *, DV: int = 0, H: int = 32, G: int = 8, T: int = 200, modifiers: tuple[str, ...] = (), max_keys: int = 8192
) -> torch.Tensor:
    """One mixed step of three sequences (T = 3: of pure decode), on tensors whose contents nobody reads."""
    DV, B, page_size, splits = DV or D, 3, 16, num_splits(max_keys)
    integers, floats = partial(torch.zeros, dtype=torch.int32), partial(torch.zeros, dtype=dtype)
    arguments: dict[str, Any] = {
        "softcap": 50.0,
        "sinks": floats(H),
        "alibi_slopes": torch.zeros(H),
        "rel_bias": floats(H, 128),
        "key_bias": floats(1, T, G),
        "window": 1024,
        "distance_bias": floats(1, T, H, 1024),
        "query_sinks": floats(1, T, H),
    }
    return attention(
        floats(1, T, H, D),
        floats(1, T, G, D),
        floats(1, T, G, DV),
        key_pages=floats(2, page_size, G, D),
        value_pages=floats(2, page_size, G, DV),
        key_bias_pages=floats(2, page_size, G) if "key_bias" in modifiers else None,
        cu_seqlens=integers(B + 1),
        context_lens=integers(B),
        page_table=integers(B, 8),
        token_slots=integers(T),
        partial_output=torch.zeros(B, H, splits, DV) if splits > 1 else None,
        partial_lse=torch.zeros(B, H, splits) if splits > 1 else None,
        distance_buckets=None,
        append=True,
        scale=0.1,
        **{name: arguments[name] for name in modifiers},
    )
