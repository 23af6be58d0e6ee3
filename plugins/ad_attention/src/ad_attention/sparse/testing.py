"""Cases of sparse attention for the conformance kit. Index heads are many: with few, scores of exactly zero are frequent, and equal."""

from __future__ import annotations

from typing import Any

import torch

from ad_attention.latent.testing import choices
from ad_core.testing import Case


def select_case(name: str, heads: int, dim: int, count: int, every: int = 1) -> Case:
    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {
            "query": torch.randn(batch, length, heads, dim, generator=generator),
            "key": torch.randn(batch, length, dim, generator=generator),
            "weight": torch.randn(batch, length, heads, generator=generator),
        }
        return {**{key: value.to(dtype) for key, value in arguments.items()}, "count": count, "scale": 0.5, "every": every}

    return Case(name, make)


def selected_case(name: str, heads: int, groups: int, dim: int, value_dim: int, count: int, sinks: bool = False) -> Case:
    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {
            "query": torch.randn(batch, length, heads, dim, generator=generator),
            "key": torch.randn(batch, length, groups, dim, generator=generator),
            "value": torch.randn(batch, length, groups, value_dim, generator=generator),
        }
        if sinks:
            arguments["sinks"] = torch.randn(heads, generator=generator)
        arguments = {key: value.to(dtype) for key, value in arguments.items()}
        return {**arguments, "selected": choices(generator, batch, length, count), "scale": 1.5 * dim**-0.5}

    return Case(name, make)


SELECT_CASES = [
    select_case("few", 12, 16, 4),
    select_case("most", 16, 16, 20),
    select_case("pairs", 12, 16, 5, every=2),
    select_case("blocks", 12, 16, 3, every=5),
    select_case("long_blocks", 12, 16, 2, every=20),
]
SELECTED_CASES = [
    selected_case("mha", 4, 4, 16, 8, 6),
    selected_case("gqa", 6, 2, 16, 16, 5),
    selected_case("sinks", 4, 2, 16, 16, 5, sinks=True),
]
