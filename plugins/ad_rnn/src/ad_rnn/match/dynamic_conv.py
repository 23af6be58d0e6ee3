"""A short convolution whose taps each token makes for itself: sums of the last tokens, so said by the shift of one token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.api.errors import CaptureError
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn

PARTS = "static_weight weight_proj conv_kernel_size num_heads".split()


class DynamicConvolution(ForwardSeam):
    """Taps are a weight a channel and a value that a linear of the token gives each head; the token itself is added."""

    name = "rnn.dynamic_convolution"
    produces = "ad_rnn::token_shift"
    transformers = ">=5.23"

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__.endswith("DynamicShortConvolution") and all(hasattr(part, name) for name in PARTS)

    def forward(self, part: Any, entered: Entered) -> Callable[..., Any]:
        from ad_core.graph.ops import find_op

        shift = find_op(self.produces)

        def forward(hidden_states: torch.Tensor, dynamic_input: torch.Tensor, **others: Any) -> torch.Tensor:
            """[B, S, D], and what the taps are made of, [B, S, E] -> [B, S, D]."""
            given = sorted(name for name in ("cache", "conv_mask", "seq_idx") if others.get(name) is not None)
            if given:
                raise CaptureError(
                    f"{type(part).__name__} is given {', '.join(given)}",
                    why="a captured sequence starts from zero and has no padding, and the engine keeps what it leaves",
                    hint="call the model with use_cache=False and without a mask",
                )
            taps, heads = part.conv_kernel_size, part.num_heads
            made = part.weight_proj(dynamic_input).float().unflatten(2, (heads, 1, taps))
            weights = part.static_weight.float().t().unflatten(0, (heads, -1)) + made  # [B, S, H, D/H, K]
            token, total = hidden_states, hidden_states.float()
            for back in range(taps):
                if back:
                    entered(self.produces)
                    token = shift(token)
                total = total + token.float() * weights[..., back].flatten(2)
            return (total / math.sqrt(2 * taps + 1)).to(hidden_states.dtype)

        return forward
