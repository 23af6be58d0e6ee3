"""DBRX: gate, up and down of all experts are three matrices, one expert below the other; a loop over those that are hit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.match.call import OP, activation_of, experts

if TYPE_CHECKING:
    import torch


class DbrxExpertsSeam(ForwardSeam):
    name = "hf.dbrx_experts"
    produces = OP

    def reaches(self, part: Any) -> bool:
        inner = getattr(part, "mlp", None)
        held = type(part).__name__ == "DbrxExperts" and all(hasattr(inner, name) for name in ("w1", "v1", "w2", "activation_fn"))
        return held and activation_of(part.mlp.activation_fn, part) is not None

    def forward(self, part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
        inner, shape = part.mlp, (-1, part.ffn_hidden_size, part.hidden_size)
        activation = activation_of(inner.activation_fn, part)

        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            """hidden [B, S, D], index and weights [T, K] -> [B, S, D]."""
            entered(OP)
            return experts(
                hidden_states,
                top_k_index,
                top_k_weights,
                inner.v1.view(shape),
                inner.w2.view(shape),
                gate=inner.w1.view(shape),
                layout="separate",
                down_transposed=True,
                activation=activation,
            )

        return forward
