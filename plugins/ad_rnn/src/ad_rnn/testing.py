"""Cases for the conformance kit."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.testing import Case


def rg_lru_case(name: str, channels: int, low: float, high: float) -> Case:
    """Gates between `low` and `high`."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        x = torch.randn(batch, length, channels, generator=generator)
        gate = low + (high - low) * torch.rand(batch, length, channels, generator=generator)
        return {"x": x.to(dtype), "gate": gate.to(dtype)}

    return Case(name, make)


def wkv4_case(name: str, channels: int, spread: float, decay: float, level: float = 0.0) -> Case:
    """Keys of this spread around `level`; `decay` is the mean of time_decay, the logarithm of what a channel loses at a token."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        arguments = {
            "key": level + spread * torch.randn(batch, length, channels, generator=generator),
            "value": torch.randn(batch, length, channels, generator=generator),
            "time_decay": decay + torch.randn(channels, generator=generator),
            "time_first": torch.randn(channels, generator=generator),
        }
        return {name: value.to(dtype) for name, value in arguments.items()}

    return Case(name, make)


def token_shift_case(name: str, channels: int) -> Case:
    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.randn(batch, length, channels, generator=generator).to(dtype)}

    return Case(name, make)


RG_LRU_CASES = [rg_lru_case("any_gate", 24, 0.0, 1.0), rg_lru_case("long_memory", 17, 0.97, 1.0)]
WKV4_CASES = [wkv4_case("faint", 24, 1.0, -1.0, level=-200.0), wkv4_case("even", 24, 1.0, -1.0), wkv4_case("peaked", 17, 30.0, 1.0)]
TOKEN_SHIFT_CASES = [token_shift_case("even", 24)]
