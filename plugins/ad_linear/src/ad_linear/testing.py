"""Cases for the conformance kit: head sizes, decays and gates strong and weak."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.testing import Case

LOOSE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Scores of many keys are added up and never brought back to size, so half precision's own rounding shows more."""


def lightning_case(name: str, heads: int, dim: int, width: int, decays: tuple[float, float]) -> Case:
    """`decays`: the range of -log_decay over the heads."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch, length, heads, *shape, generator=generator).to(dtype)

        log_decay = -torch.linspace(*decays, heads)
        return {"query": normal(dim), "key": normal(dim), "value": normal(width), "log_decay": log_decay.to(dtype), "scale": dim**-0.5}

    return Case(name, make, LOOSE)


def mlstm_case(name: str, heads: int, dim: int, width: int, gates: tuple[float, float]) -> Case:
    """`gates`: the means of the input and forget gates before their activation."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch, length, heads, *shape, generator=generator)

        arguments = {
            "query": normal(dim),
            "key": normal(dim),
            "value": normal(width),
            "input_gate": gates[0] + 2 * normal(),
            "forget_gate": gates[1] + 2 * normal(),
        }
        return {**{key: value.to(dtype) for key, value in arguments.items()}, "scale": dim**-0.5}

    return Case(name, make, LOOSE)


LIGHTNING_CASES = [
    lightning_case("square", 2, 8, 8, (0.1, 1.0)),
    lightning_case("wide_value", 3, 8, 24, (0.0, 0.3)),
    lightning_case("fast_decay", 2, 16, 8, (5.0, 20.0)),
]

MLSTM_CASES = [
    mlstm_case("even", 2, 8, 8, (0.0, 2.0)),
    mlstm_case("wide_value", 2, 8, 24, (-10.0, 4.0)),
    mlstm_case("forgetful", 3, 16, 8, (3.0, -6.0)),
]
