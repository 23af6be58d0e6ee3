"""The seam of transformers' models: expert modules behind its experts interface call the canonical op."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined
from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.gating import Gating, Layout
from ad_moe.match.call import OP, constants, experts
from ad_moe.match.norm import same_as_post_norm
from ad_moe.match.recognise import numbers_of, recognised

if TYPE_CHECKING:
    import torch
    from torch import nn

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What the interface's decorator writes on every module that goes through it."""


class HfExpertsSeam(ForwardSeam):
    """Experts whose class is behind `use_experts_implementation`. Those that compute something that the op does not are left to
    transformers' own grouped form, which exports too."""

    name = "hf.experts"
    produces = OP
    transformers = ">=5.17"

    def __init__(self) -> None:
        self._found: dict[Hashable, Gating | str] = {}

    def applies(self, module: nn.Module) -> Declined | None:
        parts = [part for part in module.modules() if _behind_interface(part)]
        if not parts:
            return Declined(f"{type(module).__name__} has no experts behind transformers' experts interface")
        if any(map(self.reaches, parts)):
            return None
        return Declined("; ".join(sorted({str(self._described(part)) for part in parts})))

    def reaches(self, part: Any) -> bool:
        return _behind_interface(part) and isinstance(self._described(part), Gating)

    def forward(self, part: Any, entered: Entered) -> Callable[..., torch.Tensor]:
        gating = self._described(part)
        assert isinstance(gating, Gating)
        names = list(inspect.signature(type(part).forward).parameters)[1:4]
        fixed: dict[str, Any] = {"up_transposed": part.is_transposed, "down_transposed": part.is_transposed, **constants(gating)}
        held = part

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            """hidden [T, D] or [B, S, D], selected and weights [T, K] or [B, S, K] -> as hidden."""
            hidden, selected, weights = ({**dict(zip(names, args, strict=False)), **kwargs}[name] for name in names)
            up, down = (held.gate_up_proj if held.has_gate else held.up_proj), held.down_proj
            if held.has_bias:
                fixed["up_bias"] = held.gate_up_proj_bias if held.has_gate else held.up_proj_bias
                fixed["down_bias"] = held.down_proj_bias
            if getattr(held, "has_post_expert_norm", False):
                fixed["norm"], fixed["norm_eps"] = 1.0 + held.post_expert_norm.weight, held.post_expert_norm.eps
            entered(OP)
            return experts(hidden, selected, weights, up, down, **fixed)

        return forward

    def _described(self, part: Any) -> Gating | str:
        """`described`, once for all layers that hold the same numbers and kinds of modules: trying takes milliseconds."""
        flags = (getattr(part, flag, None) for flag in (*FLAGS, "has_post_expert_norm", "_is_expert_parallel"))
        key = (_shape_of(part), numbers_of(part), *flags)
        if key not in self._found:
            self._found[key] = described(part)
        return self._found[key]


def _shape_of(part: nn.Module) -> Hashable:
    """The classes of the module and its parts, and the functions that they hold themselves."""
    held = (value for each in part.modules() for value in vars(each).values() if callable(value))
    return tuple(type(each) for each in part.modules()), tuple(held)


def described(part: Any) -> Gating | str:
    """What the experts of `part` compute between their projections, or why the op cannot say it."""
    kind = type(part).__name__
    if getattr(part, "has_post_expert_norm", False) and not same_as_post_norm(part.post_expert_norm):
        return f"{kind} normalises what its experts give in a way that the op does not"
    if getattr(part, "_is_expert_parallel", False):
        return f"{kind} is spread over ranks already"
    layout: Layout = "none" if not part.has_gate else "concatenated" if part.is_concatenated else "interleaved"
    found = recognised(part._apply_gate if part.has_gate else part.act_fn, part, layout)
    return found or f"{kind} has a gate that is none of those that the op knows"


def _behind_interface(part: Any) -> bool:
    return all(hasattr(part, flag) for flag in FLAGS) and hasattr(part, "down_proj")
