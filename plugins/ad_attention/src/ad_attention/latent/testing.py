"""Cases of latent attention for the conformance kit."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.testing import Case


def case(name: str, heads: int, nope: int, rope: int, value: int, latent: int, count: int | None = None, **constants: Any) -> Case:
    """`count`: each token sees a choice of at most so many positions, its own among them."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        arguments = {
            "q_nope": normal(batch, length, heads, nope),
            "q_rope": normal(batch, length, heads, rope),
            "latent": normal(batch, length, latent),
            "k_rope": normal(batch, length, rope),
            "up_weight": latent**-0.5 * normal(heads * (nope + value), latent),
            "scale": 1.5 * (nope + rope) ** -0.5,
            **constants,
        }
        if constants.get("sinks"):
            arguments["sinks"] = normal(heads)
        arguments = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        if count is not None:
            arguments["selected"] = choices(generator, batch, length, count)
        return arguments

    return Case(name, make)


def choices(generator: torch.Generator, batch: int, length: int, count: int) -> torch.Tensor:
    """[B, S, count] int64: distinct positions up to the token's own, which is always there; -1 where there are fewer."""
    order = torch.rand(batch, length, length, generator=generator)
    order.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -1.0)
    order.diagonal(dim1=1, dim2=2).fill_(2.0)
    best = torch.nn.functional.pad(order, (0, count), value=-1.0).topk(count, -1)
    return torch.where(best.values < 0, -1, best.indices)


CASES = [
    case("mla", 4, 16, 8, 16, 24),
    case("one_head", 1, 16, 8, 8, 16),
    case("narrow_latent", 6, 16, 8, 24, 8),
    case("window", 4, 16, 8, 16, 24, window=5),
    case("sinks", 4, 16, 8, 16, 24, sinks=True),
    case("window_sinks", 2, 8, 8, 16, 16, window=7, sinks=True),
    case("selected", 4, 16, 8, 16, 24, count=6),
    case("selected_sinks", 4, 16, 8, 16, 24, count=5, sinks=True),
]
