"""Llama 4: every expert computes every token, most of them zeroed. With the op an expert computes the tokens that chose it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.match.call import OP, activation_of, experts

if TYPE_CHECKING:
    import torch


class Llama4ExpertsSeam(ForwardSeam):
    """The block as a whole: its experts alone do not see which tokens chose them. Experts have no bias, so a zeroed token adds zero."""

    name = "hf.llama4_experts"
    produces = OP

    def reaches(self, part: Any) -> bool:
        named = type(part).__name__ == "Llama4TextMoe" and all(hasattr(part, name) for name in ("router", "shared_expert", "top_k"))
        return named and activation_of(part.experts.act_fn, part) is not None

    def forward(self, part: Any, entered: Entered) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        inner = part.experts
        activation = activation_of(inner.act_fn, part)

        def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """hidden [B, S, D] -> [T, D] and the router's logits [T, E]."""
            flat = hidden_states.reshape(-1, part.hidden_dim)
            scores, logits = part.router(flat)
            weights, selected = scores.topk(part.top_k, -1)
            entered(OP)
            routed = experts(
                flat,
                selected,
                weights,
                inner.gate_up_proj,
                inner.down_proj,
                weigh_input=True,
                up_transposed=True,
                down_transposed=True,
                activation=activation,
            )
            return part.shared_expert(flat) + routed, logits

        return forward
