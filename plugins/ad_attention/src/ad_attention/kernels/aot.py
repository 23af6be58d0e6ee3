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
from ad_attention.latent.triton_launch import latent_attention
from ad_attention.sparse.triton_launch import select

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
        "bf16-d128-selected": partial(_step, BF16, 128, choices=2048, modifiers=("sinks",)),
        "bf16-d80-selected": partial(_step, BF16, 80, G=32, choices=256),
        "fp32-d128-selected": partial(_step, FP32, 128, choices=2048),
        "bf16-mla": partial(_latent, BF16),
        "bf16-mla-decode": partial(_latent, BF16, T=3),
        "bf16-mla-selected": partial(_latent, BF16, choices=2048),
        "bf16-mla-h16": partial(_latent, BF16, H=16),
        "bf16-mla-h32": partial(_latent, BF16, H=32),
        "bf16-mla-h130-decode": partial(_latent, BF16, H=130, T=3),
        "bf16-mla-r256-h40": partial(_latent, BF16, H=40, R=256, P=32),
        "bf16-mla-window-sinks": partial(_latent, BF16, window=1024, sinks=True),
        "fp16-mla": partial(_latent, FP16),
        "fp32-mla": partial(_latent, FP32),
        "fp32-mla-selected-sinks": partial(_latent, FP32, H=16, choices=2048, sinks=True),
        "bf16-select": partial(_select, BF16),
        "bf16-select-h32-d64": partial(_select, BF16, I=32, D=64),
        "fp32-select": partial(_select, FP32),
    }


def _step(
    dtype: torch.dtype,
    D: int,
    *,
    DV: int = 0,
    H: int = 32,
    G: int = 8,
    T: int = 200,
    modifiers: tuple[str, ...] = (),
    max_keys: int = 8192,
    choices: int | None = None,
) -> torch.Tensor:
    """One mixed step of three sequences (T = 3: of pure decode), on tensors whose contents nobody reads."""
    DV, B, page_size, splits = DV or D, 3, 16, num_splits(choices or max_keys)
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
        selected=None if choices is None else torch.zeros(1, T, choices, dtype=torch.int64),
        **{name: arguments[name] for name in modifiers},
    )


def _latent(
    dtype: torch.dtype,
    *,
    H: int = 128,
    R: int = 512,
    P: int = 64,
    T: int = 20,
    window: int | None = None,
    sinks: bool = False,
    choices: int | None = None,
) -> torch.Tensor:
    """Likewise, of latent attention."""
    N = V = 128
    B, splits = 3, num_splits(window or choices or 8192)
    integers, floats = partial(torch.zeros, dtype=torch.int32), partial(torch.zeros, dtype=dtype)
    return latent_attention(
        floats(1, T, H, N),
        floats(1, T, H, P),
        floats(1, T, R),
        floats(1, T, P),
        floats(H * (N + V), R),
        latent_pages=floats(2, 16, R + P),
        cu_seqlens=integers(B + 1),
        context_lens=integers(B),
        page_table=integers(B, 8),
        token_slots=integers(T),
        partial_output=torch.zeros(B, H, splits, R),
        partial_lse=torch.zeros(B, H, splits),
        append=True,
        scale=0.1,
        window=window,
        sinks=floats(H) if sinks else None,
        selected=None if choices is None else torch.zeros(1, T, choices, dtype=torch.int64),
    )


def _select(dtype: torch.dtype, *, I: int = 64, D: int = 128, T: int = 20) -> torch.Tensor:  # noqa: E741
    """Likewise, of an indexer."""
    B = 3
    integers, floats = partial(torch.zeros, dtype=torch.int32), partial(torch.zeros, dtype=dtype)
    return select(
        floats(1, T, I, D),
        floats(1, T, D),
        floats(1, T, I),
        count=64,
        scale=0.1,
        append=True,
        index_pages=floats(2, 16, D),
        page_table=integers(B, 8),
        cu_seqlens=integers(B + 1),
        context_lens=integers(B),
        token_slots=integers(T),
    )
