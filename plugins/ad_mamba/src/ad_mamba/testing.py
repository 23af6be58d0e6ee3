"""Cases for the conformance kit: decays from almost none to almost total, groups, skips, gates and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ad_core.testing import Case

Arguments = dict[str, Any]


def _cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def ssd_case(name: str, heads: int = 4, groups: int = 2, width: int = 8, size: int = 16, **options: Any) -> Case:
    """`options` are constants of the call; a True for D, z or dt_bias draws it, "wide" draws a D of [H, P]."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> Arguments:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        drawn: dict[str, Callable[[], torch.Tensor]] = {
            "D": lambda: normal(heads, width) if options.get("D") == "wide" else normal(heads),
            "z": lambda: normal(batch, length, heads, width),
            "dt_bias": lambda: normal(heads),
        }
        arguments = {
            "x": normal(batch, length, heads, width),
            "dt": normal(batch, length, heads) if options.get("dt_softplus") else torch.rand(batch, length, heads, generator=generator),
            "A": -torch.exp(2 * normal(heads)),
            "B": normal(batch, length, groups, size) / size**0.5,
            "C": normal(batch, length, groups, size),
        }
        return _cast(arguments | {key: drawn[key]() if key in drawn else value for key, value in options.items()}, dtype)

    return Case(name, make)


def scan_case(name: str, channels: int = 12, size: int = 8, **options: Any) -> Case:
    """Likewise, for D, z and delta_bias."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> Arguments:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        drawn: dict[str, Callable[[], torch.Tensor]] = {
            "D": lambda: normal(channels),
            "z": lambda: normal(batch, length, channels),
            "delta_bias": lambda: normal(channels),
        }
        softplus = options.get("delta_softplus")
        arguments = {
            "u": normal(batch, length, channels),
            "delta": normal(batch, length, channels) if softplus else torch.rand(batch, length, channels, generator=generator),
            "A": -torch.exp(2 * normal(channels, size)),
            "B": normal(batch, length, size) / size**0.5,
            "C": normal(batch, length, size),
        }
        return _cast(arguments | {key: drawn[key]() if key in drawn else value for key, value in options.items()}, dtype)

    return Case(name, make)


SSD_CASES = [
    ssd_case("zoo", D=True, dt_bias=True, dt_softplus=True),
    ssd_case("plain", heads=3, groups=1, width=5, size=6),
    ssd_case("everything", heads=6, groups=3, D="wide", z=True, dt_bias=True, dt_softplus=True, dt_min=0.1, dt_max=1.5),
]
SCAN_CASES = [
    scan_case("zoo", D=True, z=True, delta_bias=True, delta_softplus=True),
    scan_case("plain", channels=5, size=3),
]
