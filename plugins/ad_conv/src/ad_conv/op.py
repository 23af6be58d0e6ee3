"""The canonical op: one causal filter a channel over one whole sequence, in plain torch. The truth that every kernel is held to."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ad_core.api import Role
from ad_core.graph.ops import define_op

OP = "ad_conv::causal_conv1d"
SCHEMA = f'{OP}(Tensor x, Tensor weight, Tensor? bias=None, *, str activation="") -> Tensor'
ROLES = {"x": Role.TOKEN, "weight": Role.PARAM, "bias": Role.PARAM, "activation": Role.CONST}
ACTIVATIONS = ("", "silu")
BLOCK = 1 << 18
"""Numbers of a block of tokens: what is in between stays in a core's cache, and memory is not fetched from the system for it."""


def causal_conv1d_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = ""
) -> torch.Tensor:
    """y_t = act(bias + sum over k of weight[:, k] * x_(t - K + 1 + k)), x zero before the sequence begins.

    x [B, S, C], weight [C, K] for any K >= 1, bias [C] -> [B, S, C], contiguous, of x's dtype. `activation` is "" or "silu".
    Half precision is computed in float32 and rounded once. Raises `ValueError` for another activation.
    """
    check_activation(activation)
    return filtered(F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight, bias, activation)


def filtered(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The outputs of the last S of the S + K - 1 tokens of `window` [..., S + K - 1, C] -> [..., S, C], contiguous, of its dtype."""
    width = weight.shape[1]
    length = window.shape[-2] - width + 1
    dtype = torch.promote_types(window.dtype, torch.float32)
    if length == 1:
        return _finished((window.to(dtype) * weight.t()).sum(-2, keepdim=True), bias, activation).to(window.dtype)
    taps = weight.to(dtype).t().contiguous()  # [K, C]
    rows = max(BLOCK // max(1, window[..., 0, :].numel()), 1)
    parts = []
    for start in range(0, length, rows):
        count = min(rows, length - start)
        seen = window.narrow(-2, start, count + width - 1).to(dtype)
        result = seen.narrow(-2, 0, count) * taps[0]
        for k in range(1, width):
            result.addcmul_(seen.narrow(-2, k, count), taps[k])
        parts.append(_finished(result, bias, activation).to(window.dtype))
    return torch.cat(parts, -2) if parts else window.new_empty(*window.shape[:-2], 0, window.shape[-1])


def _finished(result: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """Overwrites `result`."""
    if bias is not None:
        result.add_(bias)
    return F.silu(result, inplace=True) if activation else result


def check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP} has no activation {activation!r}; it has {', '.join(map(repr, ACTIVATIONS))}")


def causal_conv1d_fake(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, C], contiguous, of x's dtype."""
    return x.new_empty(x.shape)


causal_conv1d = define_op(SCHEMA, causal_conv1d_reference, causal_conv1d_fake)
