"""The seam of transformers' models: expert modules behind its experts interface call the canonical op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined
from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.gating import Gating, Layout
from ad_moe.match.recognise import recognised

if TYPE_CHECKING:
    import torch
    from torch import nn

OP = "ad_moe::moe"

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What the interface's decorator writes on every module that goes through it."""


class HfExpertsSeam(ForwardSeam):
    """Experts whose class is behind `use_experts_implementation`. An expert that computes something that the op does not is left to
    transformers' own grouped form, which exports too."""

    name = "hf.experts"
    produces = OP
    transformers = ">=5.17"

    def applies(self, module: nn.Module) -> Declined | None:
        parts = [part for part in module.modules() if _behind_interface(part)]
        if not parts:
            return Declined(f"{type(module).__name__} has no experts behind transformers' experts interface")
        reasons = {why for part in parts if isinstance(why := described(part), str)}
        return Declined("; ".join(sorted(reasons))) if len(reasons) and not any(map(self.reaches, parts)) else None

    def reaches(self, part: nn.Module) -> bool:
        return _behind_interface(part) and isinstance(described(part), Gating)

    def forward(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        from ad_core.graph.ops import find_op

        op, gating = find_op(OP), described(part)
        assert isinstance(gating, Gating)
        names = list(inspect.signature(type(part).forward).parameters)[1:4]
        constants = {"up_transposed": part.is_transposed, "down_transposed": part.is_transposed, **vars(gating)}

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            """hidden [T, D] or [B, S, D], selected and weights [T, K] or [B, S, K] -> as hidden."""
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            hidden, selected, weights = (given[name] for name in names)
            flat = hidden.dim() == 2
            entered(OP)
            result = op(
                hidden[None] if flat else hidden,
                selected.reshape(1, *selected.shape) if flat else selected.view(*hidden.shape[:-1], -1),
                weights.reshape(1, *weights.shape) if flat else weights.view(*hidden.shape[:-1], -1),
                part.gate_up_proj if part.has_gate else part.up_proj,
                part.down_proj,
                up_bias=(part.gate_up_proj_bias if part.has_gate else part.up_proj_bias) if part.has_bias else None,
                down_bias=part.down_proj_bias if part.has_bias else None,
                **constants,
            )
            return result[0] if flat else result

        return forward


def described(part: nn.Module) -> Gating | str:
    """What the experts of `part` compute between their projections, or why the op cannot say it."""
    kind = type(part).__name__
    if getattr(part, "has_post_expert_norm", False):
        return f"{kind} normalises what its experts give"
    if getattr(part, "_is_expert_parallel", False):
        return f"{kind} is spread over ranks already"
    layout: Layout = "none" if not part.has_gate else "concatenated" if part.is_concatenated else "interleaved"
    function = part._apply_gate if part.has_gate else part.act_fn
    return recognised(function, part, layout) or f"{kind} has a gate that is none of those that the op knows"  # type: ignore[arg-type]


def _behind_interface(part: nn.Module) -> bool:
    return all(hasattr(part, flag) for flag in FLAGS) and hasattr(part, "down_proj")
