"""What the seams share: tokens flat or in a batch, put to the op as [B, S, ...]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.graph.ops import find_op
from ad_moe.gating import Gating
from ad_moe.match.recognise import recognised

if TYPE_CHECKING:
    import torch
    from torch import nn

OP = "ad_moe::moe"
LINEAR_OP = "ad_moe::routed_linear"


def experts(
    hidden: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor, **others: Any
) -> torch.Tensor:
    """The canonical op on hidden [T, D] or [B, S, D] with selected and weights of [T, K] or [B, S, K] -> as hidden."""
    batched = hidden if hidden.dim() == 3 else hidden[None]
    choices = (*batched.shape[:2], selected.shape[-1])
    result: torch.Tensor = find_op(OP)(batched, selected.reshape(choices), weights.reshape(choices), up, down, **others)
    return result if hidden.dim() == 3 else result[0]


def activation_of(function: Callable[..., Any], holder: nn.Module) -> str | None:
    """The name of an activation, found by trying it out, or None."""
    found = recognised(function, holder, "none")
    return None if found is None else found.activation


def constants(gating: Gating) -> dict[str, Any]:
    """The op's arguments that describe a gating."""
    return dict(vars(gating))
