"""Compressed convolutional attention: queries, keys and half of the values that look a token or two back before they attend.

Its convolutions and its delayed values are sums of what the last tokens hold, so they are said by the one op that gives each token what
the token before it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined
from ad_core.api.errors import OpDefinitionError
from ad_core.graph.ops import find_op
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn

SHIFT = "ad_rnn::token_shift"
PARTS = "q_proj k_proj v_proj_current v_proj_delayed conv_qk_depthwise conv_qk_grouped num_key_value_groups head_dim".split()


class ConvolvedAttentionSeam(ForwardSeam):
    """Zyphra's CCA projection, which gives query, key and value [B, S, heads, D] of hidden states [B, S, hidden]."""

    name = "hf.convolved_attention"
    produces = SHIFT

    def applies(self, module: nn.Module) -> Declined | None:
        declined = super().applies(module)
        if declined is not None:
            return declined
        try:
            find_op(SHIFT)
        except OpDefinitionError:
            return Declined(f"its short convolutions need {SHIFT}, which no installed plugin defines: install ad-rnn")
        return None

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__ == "ZayaCCAProjection" and all(hasattr(part, name) for name in PARTS)

    def forward(self, part: Any, entered: Entered) -> Callable[..., Any]:
        shift = find_op(SHIFT)

        def before(x: torch.Tensor, first: torch.Tensor | None) -> torch.Tensor:
            """[B, S, C] one token later; the first token gets `first` [C], or zeros."""
            entered(SHIFT)
            return shift(x) if first is None else shift(x - first) + first

        def depthwise(x: torch.Tensor, conv: nn.Conv1d) -> torch.Tensor:
            taps = conv.weight[:, 0]  # [C, K]
            total = x * taps[:, -1]
            for back in range(2, taps.shape[1] + 1):
                x = before(x, None)
                total = total + x * taps[:, -back]
            return total if conv.bias is None else total + conv.bias

        def grouped(x: torch.Tensor, conv: nn.Conv1d, first: torch.Tensor | None) -> torch.Tensor:
            weight = conv.weight.unflatten(0, (conv.groups, -1))  # [groups, out, in, K]
            total = None
            for back in range(1, weight.shape[3] + 1):
                x = x if back == 1 else before(x, first)
                rows = x.unflatten(2, (conv.groups, 1, -1)) @ weight[..., -back].transpose(1, 2)
                total = rows if total is None else total + rows
            assert total is not None
            flat = total.flatten(2)
            return flat if conv.bias is None else flat + conv.bias

        def forward(hidden_states: torch.Tensor, past_key_values: Any = None, conv_mask: Any = None) -> tuple[torch.Tensor, ...]:
            import torch

            by_head = (*hidden_states.shape[:-1], -1, part.head_dim)
            queries, keys = part.q_proj(hidden_states), part.k_proj(hidden_states)
            repeated = keys.view(by_head).repeat_interleave(part.num_key_value_groups, 2)
            query = (queries.view(by_head) + repeated) * 0.5
            key = query.unflatten(2, (-1, part.num_key_value_groups)).mean(3)
            # the second convolution looks back at what the first one makes of nothing
            mixed = depthwise(torch.cat([queries, keys], -1), part.conv_qk_depthwise)
            mixed = grouped(mixed, part.conv_qk_grouped, part.conv_qk_depthwise.bias)
            width = queries.shape[-1]
            delayed = before(part.v_proj_delayed(hidden_states), part.v_proj_delayed.bias)
            value = torch.cat([part.v_proj_current(hidden_states), delayed], -1)
            return mixed[..., :width].view(by_head) + query, mixed[..., width:].view(by_head) + key, value.view(by_head)

        return forward
