"""Cases for the conformance kit: every head layout and every modifier, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ad_core.testing import Case

Extra = Callable[[torch.Generator, int, int, int, int], dict[str, Any]]
"""(generator, batch, length, query heads, key/value heads) -> modifiers in float32 by name."""


def case(name: str, heads: int, groups: int, dim: int, value_dim: int, extra: Extra = lambda *_: {}) -> Case:
    """Queries and keys large enough that a softmax has a favourite."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        arguments = {
            "query": normal(batch, length, heads, dim),
            "key": normal(batch, length, groups, dim),
            "value": normal(batch, length, groups, value_dim),
            "scale": 1.5 * dim**-0.5,
            **extra(generator, batch, length, heads, groups),
        }
        return {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}

    return Case(name, make)


def _sinks(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"sinks": torch.randn(heads, generator=generator)}


def _alibi(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"alibi_slopes": 2.0 ** -torch.arange(1, heads + 1)}


def _t5(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"rel_bias": torch.randn(heads, 8, generator=generator), "rel_bias_rule": "t5:20"}


def _clip(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"rel_bias": torch.randn(heads, 5, generator=generator), "rel_bias_rule": "clip"}


def _key_bias(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"key_bias": 2 * torch.randn(batch, length, groups, generator=generator)}


def _distance_bias(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"distance_bias": 2 * torch.randn(batch, length, heads, 6, generator=generator)}


def _query_sinks(generator: torch.Generator, batch: int, length: int, heads: int, groups: int) -> dict[str, Any]:
    return {"query_sinks": 2 * torch.randn(batch, length, heads, generator=generator)}


def _everything(*sizes: Any) -> dict[str, Any]:
    given = [make(*sizes) for make in (_sinks, _alibi, _t5, _key_bias, _distance_bias, _query_sinks)]
    return {"window": 9, "chunk": 13, "softcap": 3.0, **{name: value for each in given for name, value in each.items()}}


CASES = [
    case("mha", 2, 2, 16, 16),
    case("gqa", 6, 2, 16, 16),
    case("mqa", 4, 1, 16, 16),
    case("wide_value", 4, 2, 8, 16),
    case("narrow_value", 2, 2, 16, 8),
    case("window", 4, 2, 16, 16, lambda *_: {"window": 5}),
    case("window_one", 2, 1, 8, 8, lambda *_: {"window": 1}),
    case("chunk", 4, 2, 16, 16, lambda *_: {"chunk": 6}),
    case("softcap", 4, 2, 16, 16, lambda *_: {"softcap": 1.5}),
    case("sinks", 4, 2, 16, 16, _sinks),
    case("window_sinks", 4, 2, 16, 16, lambda *sizes: {"window": 7, **_sinks(*sizes)}),
    case("alibi", 4, 2, 16, 16, _alibi),
    case("t5", 4, 4, 16, 16, _t5),
    case("clip", 4, 2, 16, 16, _clip),
    case("key_bias", 4, 2, 16, 16, _key_bias),
    case("distance_bias", 4, 2, 16, 16, _distance_bias),
    case("far_distance_bias", 2, 1, 8, 8, lambda *sizes: {"distance_bias": torch.randn(sizes[1], sizes[2], 2, 200, generator=sizes[0])}),
    case("window_distance_bias", 6, 2, 16, 16, lambda *sizes: {"window": 8, **_distance_bias(*sizes)}),
    case("query_sinks", 4, 2, 16, 16, _query_sinks),
    case("everything", 4, 2, 16, 8, _everything),
]
