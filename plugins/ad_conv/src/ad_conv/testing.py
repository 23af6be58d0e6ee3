"""Cases for the conformance kit: every width, with and without bias and activation."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.testing import Case


def case(name: str, width: int, channels: int = 6, bias: bool = True, activation: str = "silu") -> Case:
    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        given = {"bias": normal(channels)} if bias else {}
        return {"x": normal(batch, length, channels), "weight": normal(channels, width), "activation": activation, **given}

    return Case(name, make)


CASES = [
    case("silu", 4),
    case("plain", 3, bias=False, activation=""),
    case("biased", 4, channels=20, activation=""),
    case("two_taps", 2, bias=False),
    case("one_tap", 1),
    case("long", 7, channels=3),
]
