"""Attention with a dynamic mask: every key has a bias of its own, made from its value; models hand it on as part of their mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_attention.match.hf_masks import plain_mask
from ad_core.api.errors import CaptureError
from ad_core.graph.ops import find_op
from ad_core.graph.seams import Entered, ForwardSeam

if TYPE_CHECKING:
    import torch
    from torch import nn

OP = "ad_attention::attention"
PARTS = "q_proj k_proj v_proj o_proj q_norm k_norm dt_proj A keep_window_size head_dim scaling".split()


class DynamicMaskSeam(ForwardSeam):
    """Doge's attention. Beyond `keep_window_size` keys it would drop those of lowest bias: refused for models that can be so long."""

    name = "hf.dynamic_mask"
    produces = OP

    def reaches(self, part: nn.Module) -> bool:
        return type(part).__name__ == "DogeAttention" and all(hasattr(part, name) for name in PARTS)

    def forward(self, part: Any, entered: Entered) -> Callable[..., Any]:
        rotate = sys.modules[type(part).__module__].apply_rotary_pos_emb
        longest = getattr(part.config, "max_position_embeddings", None)
        op = find_op(OP)

        def forward(
            hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, past_key_values: Any = None, **_: Any
        ) -> tuple[torch.Tensor, None]:
            import torch

            if longest is None or longest > part.keep_window_size:
                raise CaptureError(
                    "an attention layer chooses among its keys by a bias of theirs",
                    where=type(part).__name__,
                    why=f"it keeps {part.keep_window_size} keys, and a sequence may have {longest}",
                    hint=f"set max_position_embeddings to {part.keep_window_size} in config.json",
                )
            mask = plain_mask(attention_mask, type(part).__name__)
            by_head = (*hidden_states.shape[:-1], -1, part.head_dim)
            query, key = part.q_norm(part.q_proj(hidden_states).view(by_head)), part.k_norm(part.k_proj(hidden_states).view(by_head))
            value = part.v_proj(hidden_states)
            query, key = (x.transpose(1, 2) for x in rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings))
            bias = torch.exp(part.A * torch.nn.functional.softplus(part.dt_proj(value)))  # [B, S, G]
            entered(OP)
            mixed = op(query, key, value.view(by_head), scale=part.scaling, window=mask.window, key_bias=bias)
            return part.o_proj(mixed.flatten(2)), None

        return forward
