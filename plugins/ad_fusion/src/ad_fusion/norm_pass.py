"""Finds root mean square norms, which models write as half a dozen operations, and makes one of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.graph.edit import insert_call, is_op, replace
from ad_fusion.nodes import called, only_user, other_factor
from ad_fusion.norm import LIBRARY, rms_norm

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")
_HALF = (torch.bfloat16, torch.float16)


class FuseNorms(Pass):
    """`x * rsqrt(mean(x ** 2) + eps) * weight`, in float32 and with any cast around it, becomes `ad_fusion::rms_norm` on the CPU."""

    name = "fusion.norms"
    stage = Stage.COMPILE
    before = ("core.prepack",)
    safety = "reordered"
    requires_ops = ("aten::rsqrt",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        if context.device.type != "cpu":
            report.declined.append(f"the model runs on {context.device}: the fused norm is the CPU's")
            return report
        for node in list(graph.graph.nodes):
            found = _norm_around(node) if is_op(node, "aten::rsqrt") else None
            if found is None:
                continue
            reason = found.why_not()
            if reason is not None:
                report.declined.append(f"{node.name}: {reason}")
                continue
            fused = insert_call(found.last, rms_norm, found.source, found.weight, found.eps, found.round_first, found.dtype)
            replace(found.last, fused)
            report.matched += 1
        graph.graph.eliminate_dead_code()
        return report


@dataclass(frozen=True)
class _Norm:
    """A norm in a graph: what it reads, its result `last`, and the arguments of the op that computes it."""

    source: Node
    last: Node
    weight: Node | None
    eps: float
    round_first: bool
    dtype: torch.dtype

    def why_not(self) -> str | None:
        """Why it is left as it is; None if the op can be put in."""
        if not self.last.meta["val"].is_contiguous():
            return "its result is not contiguous"
        declined = LIBRARY.declined(self.dtype)
        return None if declined is None else declined.reason


def _norm_around(rsqrt: Node) -> _Norm | None:
    """The norm whose inverse root this is. All between is read by nothing else, and is float32."""
    shifted, scaled = called(rsqrt.args[0], "aten::add"), only_user(rsqrt)
    if shifted is None or scaled is None or not is_op(scaled, "aten::mul"):
        return None
    mean, eps = called(shifted.args[0], "aten::mean"), shifted.args[1]
    wide = other_factor(scaled, rsqrt)
    if mean is None or not isinstance(eps, float | int) or shifted.kwargs or wide is None:
        return None
    if not _is_mean_square(mean, wide) or wide.meta["val"].dtype != torch.float32:
        return None
    weight, round_first, last = None, False, scaled
    after = only_user(scaled)
    if after is not None and is_op(after, "aten::mul") and (weight := _weight(after, scaled)) is not None:
        last = after
        if (cast := only_user(after)) is not None and _rounds(cast):
            last = cast
    elif after is not None and _rounds(after):
        last = after
        product = only_user(after)
        if product is not None and is_op(product, "aten::mul") and product.meta["val"].dtype == after.meta["val"].dtype:
            weight = _weight(product, after)
            last, round_first = (after, False) if weight is None else (product, True)
    dtype = last.meta["val"].dtype
    if weight is not None and weight.meta["val"].dtype not in (torch.float32, dtype):
        return None
    narrow = wide.args[0] if is_op(wide, *_CASTS) else None
    source = narrow if isinstance(narrow, Node) and narrow.meta["val"].dtype == dtype else wide
    return _Norm(source, last, weight, float(eps), round_first, dtype)


def _is_mean_square(mean: Node, x: Node) -> bool:
    """Whether it is the mean of the squares of x along its last dimension, which stays."""
    given, dims, keep = (*mean.args, None, None)[:3]
    square = called(given, "aten::pow", "aten::square", "aten::mul")
    along_last = isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] in (-1, x.meta["val"].dim() - 1)
    if square is None or square.args[0] is not x or mean.kwargs or not along_last or keep is not True:
        return False
    return len(square.args) == 1 or square.args[1] is x or (is_op(square, "aten::pow") and square.args[1] in (2, 2.0))


def _weight(product: Node, x: Node) -> Node | None:
    """The factor [D] that x [..., D] is multiplied by."""
    other = other_factor(product, x)
    value = other.meta.get("val") if other is not None else None
    width = x.meta["val"].shape[-1]
    return other if isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(width, int) and value.shape[0] == width else None


def _rounds(node: Node) -> bool:
    return is_op(node, *_CASTS) and node.meta["val"].dtype in _HALF
