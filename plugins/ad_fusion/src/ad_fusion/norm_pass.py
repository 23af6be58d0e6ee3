"""Finds root mean square norms, which models write as half a dozen operations, and makes one of each."""

from __future__ import annotations

import torch
from torch.fx import Node

from ad_core.graph.edit import is_op
from ad_fusion.fusing import Found, Fusion, called, only_user, other_factor
from ad_fusion.norm import LIBRARY, rms_norm

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")
_HALF = (torch.bfloat16, torch.float16)


class FuseNorms(Fusion):
    """`x * rsqrt(mean(x ** 2) + eps) * weight`, in float32 and with any cast around it, becomes `ad_fusion::rms_norm` on the CPU."""

    name = "fusion.norms"
    op = rms_norm
    anchor = "aten::rsqrt"
    requires_ops = (anchor,)

    def find(self, node: Node) -> Found | None:
        """The norm whose inverse root this is. All between is read by nothing else, and is float32."""
        shifted, scaled = called(node.args[0], "aten::add"), only_user(node)
        if shifted is None or scaled is None or not is_op(scaled, "aten::mul"):
            return None
        mean, eps = called(shifted.args[0], "aten::mean"), shifted.args[1]
        wide = other_factor(scaled, node)
        if mean is None or not isinstance(eps, float | int) or shifted.kwargs or wide is None:
            return None
        if not _is_mean_square(mean, wide) or wide.meta["val"].dtype != torch.float32:
            return None
        last, weight, round_first = _weighted(scaled)
        dtype = last.meta["val"].dtype
        if weight is not None and weight.meta["val"].dtype not in (torch.float32, dtype):
            return None
        narrow = wide.args[0] if is_op(wide, *_CASTS) else None
        source = narrow if isinstance(narrow, Node) and narrow.meta["val"].dtype == dtype else wide
        return Found(last, (source, weight, float(eps), round_first, dtype), _why_not(last))


def _weighted(scaled: Node) -> tuple[Node, Node | None, bool]:
    """Where a norm ends whose quotient is `scaled`, its weight, and whether the quotient is rounded before it meets that."""
    after = only_user(scaled)
    if after is None:
        return scaled, None, False
    if is_op(after, "aten::mul") and (weight := _weight(after, scaled)) is not None:
        cast = only_user(after)
        return (cast if cast is not None and _rounds(cast) else after), weight, False
    if not _rounds(after):
        return scaled, None, False
    product = only_user(after)
    if product is not None and is_op(product, "aten::mul") and product.meta["val"].dtype == after.meta["val"].dtype:
        weight = _weight(product, after)
        if weight is not None:
            return product, weight, True
    return after, None, False


def _why_not(last: Node) -> str | None:
    if not last.meta["val"].is_contiguous():
        return "its result is not contiguous"
    declined = LIBRARY.declined(last.meta["val"].dtype)
    return None if declined is None else declined.reason


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
