"""Cases for the conformance kit: every head layout, decays strong and weak, keys of any length."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ad_core.testing import Case


def case(
    name: str, heads: int, value_heads: int, dim: int, width: int, *, decay: float | None = 1.0, channels: bool = False, l2norm: bool = True
) -> Case:
    """`decay` is the mean of -g, None leaves it out; `channels` gives each channel its own. Without `l2norm` keys are made short:
    the rule grows without bound on keys longer than the square root of 2 / beta."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch, length, *shape, generator=generator)

        key = normal(heads, dim)
        arguments: dict[str, Any] = {
            "query": normal(heads, dim),
            "key": key if l2norm else 0.9 * F.normalize(key, dim=-1),
            "value": normal(value_heads, width),
            "beta": torch.sigmoid(normal(value_heads)),
            "scale": dim**-0.5,
            "l2norm": l2norm,
        }
        spread = normal(value_heads, dim) if channels else normal(value_heads)
        arguments["g"] = None if decay is None else -decay * F.softplus(2 * spread)
        return {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}

    return Case(name, make)


QUICK_GATED_CASES = [
    case("grouped", 2, 6, 8, 8),
    case("unnormed_plain", 2, 2, 8, 16, decay=None, l2norm=False),
]
"""Enough to see most mistakes; the others are for the long run."""

GATED_CASES = [
    *QUICK_GATED_CASES,
    case("gated", 2, 2, 16, 16),
    case("plain", 2, 2, 16, 16, decay=None),
    case("wide_value", 2, 4, 8, 24),
    case("narrow_value", 2, 2, 16, 8),
    case("slow_decay", 2, 4, 16, 16, decay=0.02),
    case("fast_decay", 2, 2, 16, 16, decay=20.0),
    case("unnormed", 2, 2, 16, 16, l2norm=False),
]

QUICK_KDA_CASES = [case("channels", 2, 2, 8, 16, channels=True)]

KDA_CASES = [
    *QUICK_KDA_CASES,
    case("square", 2, 2, 16, 16, channels=True),
    case("wide_value", 2, 2, 8, 24, channels=True),
    case("slow_decay", 2, 2, 16, 16, decay=0.02, channels=True),
    case("fast_decay", 3, 3, 16, 16, decay=20.0, channels=True),
    case("unnormed", 2, 2, 16, 16, channels=True, l2norm=False),
]
