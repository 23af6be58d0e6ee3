"""Aria as it was before 5.24: one product an expert over tokens that are sorted and counted by their expert, which does not export."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.match.call import OP, experts

if TYPE_CHECKING:
    import torch


class AriaExpertsSeam(ForwardSeam):
    """Experts that route for themselves. Today's are behind the experts interface and have no such method."""

    name = "hf.aria_experts"
    produces = OP

    def reaches(self, part: Any) -> bool:
        parts = ("route_tokens_to_experts", "fc1", "fc2")
        return type(part).__name__ == "AriaExperts" and all(hasattr(part, name) for name in parts)

    def forward(self, part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
        def forward(hidden_states: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
            """hidden [T, D] and logits [T, E] -> [T, D]."""
            selected, weights = part.route_tokens_to_experts(router_logits)
            entered(OP)
            up, down = part.fc1.weight, part.fc2.weight
            return experts(hidden_states, selected, weights, up, down, up_transposed=True, down_transposed=True, activation="silu")

        return forward
