"""JetMoE: experts in the feed-forward layer, and attention whose query and output projections are experts too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined, Seam
from ad_core.graph.ops import find_op
from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.match.call import LINEAR_OP, OP, activation_of, experts

if TYPE_CHECKING:
    import torch
    from torch import nn


def _routed(router: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts and weights [.., K] of tokens [.., D], and the router's logits: its own forward also sorts, and counts on the host."""
    logits = router.layer(x).float()
    best, selected = logits.topk(router.top_k, -1)
    return selected, best.softmax(-1).type_as(x), logits


class JetMoeExpertsSeam(ForwardSeam):
    name = "hf.jetmoe_experts"
    produces = OP

    def reaches(self, part: Any) -> bool:
        named = type(part).__name__ == "JetMoeMoE" and hasattr(part, "input_linear") and hasattr(part, "router")
        return named and activation_of(part.activation, part) is not None

    def forward(self, part: Any, entered: Entered) -> Callable[[torch.Tensor], torch.Tensor]:
        activation = activation_of(part.activation, part)

        def forward(layer_input: torch.Tensor) -> torch.Tensor:
            """[B, S, D] -> [B, S, D]."""
            selected, weights, _ = _routed(part.router, layer_input)
            entered(OP)
            up, down = part.input_linear.weight, part.output_linear.weight
            return experts(layer_input, selected, weights, up, down, activation=activation) + part.bias

        return forward


class JetMoeAttentionSeam(Seam):
    """The two methods of the attention's experts, `map` to queries and `reduce` from what was attended to."""

    name = "hf.jetmoe_attention"
    produces = LINEAR_OP

    def applies(self, module: nn.Module) -> Declined | None:
        return None if self._parts(module) else Declined(f"{type(module).__name__} has no attention experts of JetMoE")

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        parts = self._parts(module)
        try:
            for part in parts:
                vars(part)["map"], vars(part)["reduce"] = _map(part, entered), _reduce(part, entered)
            yield
        finally:
            for part in parts:
                vars(part).pop("map", None)
                vars(part).pop("reduce", None)

    @staticmethod
    def _parts(module: nn.Module) -> list[nn.Module]:
        named = (part for part in module.modules() if type(part).__name__ == "JetMoeMoA")
        return [part for part in named if not {"map", "reduce"} & vars(part).keys() and hasattr(part, "input_linear")]


def _map(part: Any, entered: Entered) -> Callable[..., Any]:
    def to_queries(layer_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """[B, S, D] -> queries [B, S, K, H], the router's logits, and what `reduce` needs to know."""
        selected, weights, logits = _routed(part.router, layer_input)
        entered(LINEAR_OP)
        return find_op(LINEAR_OP)(layer_input, selected, part.input_linear.weight), logits, (selected, weights)

    return to_queries


def _reduce(part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
    def from_attention(layer_input: torch.Tensor, routing: Any) -> torch.Tensor:
        """[B, S, K, H] -> [B, S, D]."""
        selected, weights = routing
        entered(LINEAR_OP)
        result: torch.Tensor = find_op(LINEAR_OP)(layer_input, selected, part.output_linear.weight)
        return (result * weights[..., None]).sum(2) + part.bias

    return from_attention
