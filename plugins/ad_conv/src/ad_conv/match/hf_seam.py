"""The function that transformers marks "causal_conv1d_fn" in the file of every model that has a short convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ad_conv.op import ACTIVATIONS, OP, causal_conv1d
from ad_core.api.errors import CaptureError
from ad_core.graph.seams import Entered, MarkedFunctionSeam

_NAMES = {None: "", "": "", "silu": "silu", "swish": "silu"}


class MarkedConvSeam(MarkedFunctionSeam):
    """x is [B, C, S] there, as `torch.nn.Conv1d` has it. Calls for packed sequences or with states are refused."""

    name = "conv.causal_conv1d_fn"
    mark = "causal_conv1d_fn"
    produces = OP

    def replacement(self, original: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
        def marked(
            hidden_states: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None = None,
            activation: str | None = None,
            seq_idx: torch.Tensor | None = None,
            initial_states: torch.Tensor | None = None,
            return_final_states: bool = False,
            **_: Any,
        ) -> torch.Tensor:
            for name, given in (("seq_idx", seq_idx), ("initial_states", initial_states)):
                if given is not None:
                    raise CaptureError(
                        f"causal_conv1d_fn is called with {name}",
                        why="the canonical convolution starts at the first token of each row",
                    )
            if return_final_states:
                raise CaptureError("causal_conv1d_fn is asked for its final states", hint="export the model without a cache")
            own = _NAMES.get(activation)
            entered(self.produces)
            result = causal_conv1d(hidden_states.transpose(1, 2), weight, bias, activation=own or "").transpose(1, 2)
            if own is None:  # any other activation of the model's works on each number alone
                result = _activation(str(activation))(result)
            return result

        return marked


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function


assert set(_NAMES.values()) == set(ACTIVATIONS)
