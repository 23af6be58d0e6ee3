"""What a module's forward takes and returns, and the module that is traced in its place: ids (and positions) in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ad_core.api.errors import CaptureError


@dataclass(frozen=True)
class ForwardForm:
    """How to call a module: the name of its first argument, whether it takes `position_ids`, and what else it is always given."""

    ids: str
    positions: bool
    constants: Mapping[str, Any] = field(default_factory=dict)


def forward_form(module: nn.Module) -> ForwardForm:
    """Read from the signature of the module's forward. Raises `CaptureError` if it cannot be called with ids alone."""
    parameters = inspect.signature(module.forward).parameters
    named = [
        name for name, value in parameters.items() if value.kind in (value.POSITIONAL_ONLY, value.POSITIONAL_OR_KEYWORD, value.KEYWORD_ONLY)
    ]
    if not named:
        raise CaptureError(
            f"{type(module).__name__}.forward takes no token ids",
            why=f"its signature is {inspect.signature(module.forward)}",
            hint="capture calls forward(input_ids, position_ids=None) and expects logits, or an object with .logits",
        )
    ids = "input_ids" if "input_ids" in named else named[0]
    needed = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in (ids, "position_ids")]
    if needed:
        raise CaptureError(
            f"{type(module).__name__}.forward needs more than token ids: {', '.join(needed)}",
            why=f"its signature is {inspect.signature(module.forward)}",
            hint="capture calls forward(input_ids, position_ids=None); give the other arguments defaults, or wrap the module",
        )
    return ForwardForm(ids, "position_ids" in named, {"use_cache": False} if "use_cache" in named else {})


class LogitsOnly(nn.Module):
    """`module` with one signature for all: input_ids [B, S] and position_ids [B, S] (or None: the module's own) -> logits [B, S, V]."""

    def __init__(self, module: nn.Module, form: ForwardForm | None = None):
        super().__init__()
        self.module = module
        self.form = form or forward_form(module)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        given = dict(self.form.constants)
        if position_ids is not None and self.form.positions:
            given["position_ids"] = position_ids
        return logits_of(self.module(**{self.form.ids: input_ids}, **given), self.module)


def logits_of(output: Any, module: nn.Module) -> torch.Tensor:
    """The logits in what a forward returned: a tensor, an object or mapping with `logits`, or a tuple that begins with them."""
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple) and output:
        logits = output[0]
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(output).__name__}"
        raise CaptureError(
            f"{type(module).__name__}.forward returned no logits but {got}",
            hint="return logits [batch, length, vocabulary], or an object with .logits",
        )
    return logits
