"""Routed experts written out for one token and one choice at a time, in float64: nothing is sorted, grouped or batched."""

from __future__ import annotations

import math
from typing import Any

import torch


def experts(arguments: dict[str, Any]) -> torch.Tensor:
    """What `ad_moe::moe` must give for its arguments: [B, S, O] in float64."""
    given = {key: value.double() if _floats(value) else value for key, value in arguments.items()}
    tokens, selected, weights = given["tokens"], given["selected"], given["weights"]
    width = given["down"].shape[2 if given.get("down_transposed") else 1]
    out = torch.zeros(*tokens.shape[:2], width, dtype=torch.float64)
    for b in range(tokens.shape[0]):
        for s in range(tokens.shape[1]):
            for k in range(selected.shape[2]):
                expert, weight = int(selected[b, s, k]), weights[b, s, k]
                if 0 <= expert < given["up"].shape[0]:
                    if given.get("weigh_input"):
                        out[b, s] += _expert(given, expert, tokens[b, s] * weight)
                    else:
                        out[b, s] += weight * _expert(given, expert, tokens[b, s])
    return out


def _expert(given: dict[str, Any], expert: int, token: torch.Tensor) -> torch.Tensor:
    def matrix(name: str) -> torch.Tensor:
        weight = given[name][expert]
        return weight.T if given.get("down_transposed" if name == "down" else "up_transposed") else weight

    projected = matrix("up") @ token
    if given.get("up_bias") is not None:
        projected = projected + given["up_bias"][expert]
    layout = given.get("layout", "concatenated")
    if layout == "none":
        hidden = torch.stack([_activation(given, float(value)) for value in projected])
    else:
        if layout == "separate":
            gates, ups = matrix("gate") @ token, projected
        elif layout == "interleaved":
            gates, ups = projected[0::2], projected[1::2]
        else:
            gates, ups = projected[: len(projected) // 2], projected[len(projected) // 2 :]
        hidden = torch.stack([_gated(given, float(gate), float(up)) for gate, up in zip(gates, ups, strict=True)])
    result = matrix("down") @ hidden
    if given.get("down_bias") is not None:
        result = result + given["down_bias"][expert]
    if given.get("norm") is not None:
        scaled = result * given["norm"]
        result = scaled / torch.sqrt((scaled * scaled).mean() + given["norm_eps"])
    return result


def _gated(given: dict[str, Any], gate: float, up: float) -> torch.Tensor:
    limit, after = given.get("limit"), given.get("limit_activated", False)
    if limit is not None and not after:
        gate = min(gate, limit)
    if limit is not None:
        up = max(-limit, min(up, limit))
    active = float(_activation(given, gate))
    if limit is not None and after:
        active = min(active, limit)
    if given.get("up_cap"):
        up = given["up_cap"] * math.tanh(up / given["up_cap"])
    return torch.tensor(active * (up + given.get("offset", 0.0)), dtype=torch.float64)


def _activation(given: dict[str, Any], x: float) -> torch.Tensor:
    name = given.get("activation", "silu")
    if name == "silu":
        factor = given["gate_cap"] * math.tanh(x / given["gate_cap"]) if given.get("gate_cap") else x
        value = factor / (1 + math.exp(-given.get("alpha", 1.0) * x))
    elif name == "gelu":
        value = x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    elif name == "gelu_tanh":
        value = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        value = {
            "relu": max(x, 0.0),
            "relu2": max(x, 0.0) ** 2,
            "sigmoid": 1 / (1 + math.exp(-x)),
            "tanh": math.tanh(x),
            "identity": x,
        }[name]
    return torch.tensor(value, dtype=torch.float64)


def _floats(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
