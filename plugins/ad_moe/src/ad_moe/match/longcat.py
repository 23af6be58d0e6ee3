"""LongCat-Flash: behind the experts come some that give back the token as it is, and a loop over those that are hit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.match.call import OP, activation_of, experts

if TYPE_CHECKING:
    import torch


class LongcatExpertsSeam(ForwardSeam):
    """The op leaves out choices that are no expert's; what the identity experts add is one multiplication beside it."""

    name = "hf.longcat_experts"
    produces = OP

    def reaches(self, part: Any) -> bool:
        named = type(part).__name__ == "LongcatFlashExperts" and getattr(part, "gate_up_proj", None) is not None
        return named and activation_of(part.act_fn, part) is not None

    def forward(self, part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
        activation, routed = activation_of(part.act_fn, part), part.num_routed_experts

        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            """hidden [T, D], index and weights [T, K] -> [T, D]."""
            entered(OP)
            up, down = part.gate_up_proj[:routed], part.down_proj
            result = experts(hidden_states, top_k_index, top_k_weights, up, down, activation=activation)
            kept = (top_k_weights * (top_k_index >= routed)).sum(-1, keepdim=True)
            return result + (hidden_states * kept).to(result.dtype)

        return forward
