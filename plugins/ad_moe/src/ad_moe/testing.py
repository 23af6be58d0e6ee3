"""Cases for the conformance kit: every layout of the weights and every gate, alone and together."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.testing import Case


def case(
    name: str,
    *,
    experts: int = 5,
    choices: int = 2,
    inner: int = 12,
    layout: str = "concatenated",
    bias: bool = False,
    norm: bool = False,
    stray: bool = False,
    output: int = 16,
    **constants: Any,
) -> Case:
    """Tokens of width 16. `stray`: some choices are no expert's."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def stack(rows: int, columns: int, transposed: bool) -> torch.Tensor:
            weight = 1.5 * normal(experts, rows, columns) * columns**-0.5
            return weight.transpose(1, 2).contiguous() if transposed else weight

        wide = inner if layout in ("none", "separate") else 2 * inner
        up_transposed, down_transposed = (bool(constants.get(key)) for key in ("up_transposed", "down_transposed"))
        ranked = torch.rand(batch, length, experts, generator=generator)
        selected = ranked.topk(choices, -1).indices
        if stray:
            selected = torch.where(torch.rand(selected.shape, generator=generator) < 0.3, selected + experts, selected)
            selected = torch.where(torch.rand(selected.shape, generator=generator) < 0.1, -1 - selected, selected)
        arguments: dict[str, Any] = {
            "tokens": normal(batch, length, 16),
            "selected": selected,
            "weights": 0.2 + torch.rand(batch, length, choices, generator=generator),
            "up": stack(wide, 16, up_transposed),
            "down": stack(output, inner, down_transposed),
            "layout": layout,
            **constants,
        }
        if layout == "separate":
            arguments["gate"] = stack(inner, 16, up_transposed)
        if bias:
            arguments |= {"up_bias": normal(experts, wide), "down_bias": normal(experts, output)}
        if norm:
            arguments |= {"norm": 1 + 0.2 * normal(output), "norm_eps": 1e-5}
        floating = ("tokens", "weights", "up", "down", "gate", "up_bias", "down_bias", "norm")
        return {key: value.to(dtype) if key in floating else value for key, value in arguments.items()}

    return Case(name, make)


_CLAMPED: dict[str, Any] = {"alpha": 1.702, "limit": 1.5, "offset": 1.0}

CASES = [
    case("gated"),
    case("one_choice", choices=1, experts=7),
    case("all_experts", choices=3, experts=3),
    case("many_experts", experts=40, choices=6),
    case("ungated", layout="none", activation="relu2"),
    case("transposed", up_transposed=True, down_transposed=True),
    case("one_transposed", layout="separate", down_transposed=True),
    case("interleaved", layout="interleaved", bias=True, up_transposed=True, down_transposed=True, **_CLAMPED),
    case("clamped", bias=True, **_CLAMPED),
    case("clamped_after", limit=0.7, limit_activated=True),
    case("capped", gate_cap=2.0, up_cap=1.5),
    case("gelu", activation="gelu_tanh"),
    case("weighed_input", weigh_input=True),
    case("normed", norm=True, bias=True),
    case("other_width", output=24),
    case("stray_choices", stray=True, choices=3),
]


def linear_case(name: str, *, choices: int = 2, apart: bool = False, stray: bool = False) -> Case:
    """One projection from 16 to 12. `apart`: every choice brings a token of its own."""

    def make(generator: torch.Generator, batch: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
        shape = (batch, length, choices, 16) if apart else (batch, length, 16)
        return {
            "tokens": torch.randn(shape, generator=generator).to(dtype),
            "selected": torch.rand(batch, length, 5, generator=generator).topk(choices, -1).indices + (2 if stray else 0),
            "weight": (torch.randn(5, 12, 16, generator=generator) / 4).to(dtype),
        }

    return Case(name, make)


LINEAR_CASES = [linear_case("shared"), linear_case("apart", apart=True), linear_case("stray", stray=True, choices=3)]
