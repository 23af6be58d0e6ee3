"""The table of ops that are known to keep tokens apart, and under which condition.

A rule gets one argument of a call and where its tokens lie, and answers where they lie in the result (an `Axis`), that the
call mixes them (`Mixes`), that the result does not depend on them (`NOTHING`), or that the table cannot tell (`UNKNOWN`).
`TABLE` is keyed by the op's name, with an overload where that matters; ops tagged pointwise need no entry.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._ops import OpOverload
from torch.fx import Node

from ad_core.graph.axes import Axis, Sizes, reshaped
from ad_core.graph.calls import bound_arguments
from ad_core.graph.ops import qualified_name

NOTHING: Literal["nothing"] = "nothing"
UNKNOWN: Literal["unknown"] = "unknown"


@dataclass(frozen=True)
class Mixes:
    """A call that moves information between tokens, and how."""

    reason: str


Outcome = Axis | Mixes | Literal["nothing", "unknown"]
Rule = Callable[["Call", str, Node, Axis], Outcome]


class Call:
    """A node with its arguments by name and its shapes in numbers."""

    def __init__(self, node: Node, sizes: Sizes):
        self.node, self.sizes = node, sizes
        if isinstance(node.target, OpOverload):
            self.arguments = bound_arguments(node)
        else:
            self.arguments = {f"arg{index}": value for index, value in enumerate(node.args)} | dict(node.kwargs)

    def tensors(self) -> list[tuple[str, Node]]:
        """(argument's name, node) for every node among the arguments, those in lists included."""
        found: list[tuple[str, Node]] = []
        for name, value in self.arguments.items():
            found += [(name, item) for item in (value if isinstance(value, list | tuple) else (value,)) if isinstance(item, Node)]
        return found

    def shape(self, value: Any) -> tuple[int, ...]:
        """The shape of a node's value (of its first tensor, if it has several)."""
        value = value.meta["val"] if isinstance(value, Node) else value
        value = value[0] if isinstance(value, list | tuple) else value
        return self.sizes.shape(value)

    @property
    def result(self) -> tuple[int, ...]:
        return self.shape(self.node)

    def number(self, value: Any) -> Any:
        """A size or a plain argument as a number; None stays None."""
        return self.sizes.number(value.meta["val"] if isinstance(value, Node) else value)

    def dims(self, *names: str, rank: int) -> tuple[int, ...] | None:
        """The dims that an argument names, counted from the front, or None if it names none (which means all)."""
        for name in names:
            value = self.arguments.get(name)
            if value is not None and value != []:
                values = value if isinstance(value, list | tuple) else [value]
                return tuple(dim % rank for dim in values)
        return None


def judge(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """What the table says of the tokens that `node` brings to `call` as argument `name`."""
    target = call.node.target
    if not isinstance(target, OpOverload):
        return axis if target is operator.getitem else UNKNOWN
    op = qualified_name(target).removeprefix("aten::")
    rule = TABLE.get(f"{op}.{target._overloadname}") or TABLE.get(op)
    if rule is None and torch.Tag.pointwise in target.tags:
        rule = pointwise
    if rule is None or (rule in OF_FIRST and name != target._schema.arguments[0].name):
        return UNKNOWN
    return rule(call, name, node, axis)


# -- rules ------------------------------------------------------------------------------------------------------------


def pointwise(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """Broadcasting aligns dims from the right."""
    return Axis(axis.dim + len(call.result) - len(call.shape(node)), axis.outer, axis.inner)


def same_shape(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    return axis


def shape_only(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    return NOTHING


def like_other(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """type_as, expand_as: of `other` only the shape or the dtype is read."""
    return NOTHING if name == "other" else pointwise(call, name, node, axis)


def attends(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    return Mixes("attends to other tokens")


def over_dims(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """Reductions, scans, sorts and shifts: fine unless they run along the tokens."""
    rank = len(call.shape(node))
    dims = call.dims("dim", "dims", rank=rank)
    if dims is None or axis.dim in dims:
        return Mixes("runs along the tokens")
    if len(call.result) == rank:
        return axis
    return Axis(axis.dim - sum(dim < axis.dim for dim in dims), axis.outer, axis.inner)


def normalised(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """layer_norm, rms_norm: statistics over the last dims."""
    first = len(call.shape(node)) - len(call.arguments["normalized_shape"])
    return Mixes("takes statistics over the tokens") if axis.dim >= first else axis


def sliced(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """Along the tokens only the full range keeps each in its place."""
    dim = call.arguments["dim"] % len(call.shape(node))
    if dim != axis.dim or call.result[dim] == call.shape(node)[dim]:
        return axis
    return Mixes("takes a part of the tokens")


def divided(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """split, chunk and the like."""
    dim = call.arguments["dim"] % len(call.shape(node))
    return Mixes("divides the tokens") if dim == axis.dim else axis


def dim_removed(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """select, unbind."""
    dim = call.arguments["dim"] % len(call.shape(node))
    if dim == axis.dim:
        return Mixes("picks single tokens")
    return Axis(axis.dim - (dim < axis.dim), axis.outer, axis.inner)


def joined(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """cat."""
    dim = call.arguments["dim"] % len(call.result)
    if dim == axis.dim and call.result[dim] != call.shape(node)[dim]:
        return Mixes("puts something before or after the tokens")
    return axis


def stacked(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    dim = call.arguments["dim"] % len(call.result)
    return Axis(axis.dim + (dim <= axis.dim), axis.outer, axis.inner)


def inserted_slice(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """slice_scatter, select_scatter: other dims than the inserted one are those of the whole."""
    dim = call.arguments["dim"] % len(call.result)
    if dim == axis.dim and call.shape(node) != call.result:
        return Mixes("overwrites a part of the tokens")
    removed = len(call.result) - len(call.shape(node))
    return Axis(axis.dim + (removed if dim <= axis.dim else 0), axis.outer, axis.inner)


def row_major(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """view, reshape, squeeze, flatten ...: the elements keep their order."""
    kept = reshaped(axis, call.shape(node), call.result, call.sizes.length)
    return kept if kept is not None else Mixes("no dimension of the result holds whole tokens")


def permuted(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    dims = call.dims("dims", rank=len(call.result)) or ()
    return Axis(dims.index(axis.dim), axis.outer, axis.inner)


def transposed(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    rank = len(call.result)
    first, second = (call.arguments.get(f"dim{end}", call.arguments.get(f"axis{end}", end - 2)) for end in (0, 1))
    swap = {first % rank: second % rank, second % rank: first % rank} if rank > 1 else {}
    return Axis(swap.get(axis.dim, axis.dim), axis.outer, axis.inner)


def reversed_dims(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """numpy_T."""
    return Axis(len(call.result) - 1 - axis.dim, axis.outer, axis.inner)


def repeated(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    given = list(call.arguments["repeats"] if "repeats" in call.arguments else call.arguments["dims"])
    repeats = [1] * (len(call.shape(node)) - len(given)) + given
    dim = axis.dim + len(repeats) - len(call.shape(node))
    return Axis(dim, axis.outer * call.number(repeats[dim]), axis.inner)


def repeat_interleaved(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    dim, repeats = call.arguments.get("dim"), call.arguments.get("repeats")
    if dim is None or (isinstance(repeats, Node) and isinstance(repeats.meta["val"], torch.Tensor)):
        return UNKNOWN
    if dim % len(call.result) != axis.dim:
        return axis
    return Axis(axis.dim, axis.outer, axis.inner * call.number(repeats))


def padded(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    if call.result[axis.dim] != call.shape(node)[axis.dim]:
        return Mixes("pads the tokens")
    pad, from_end = call.arguments["pad"], len(call.result) - 1 - axis.dim
    ends = [call.number(amount) for amount in pad[2 * from_end : 2 * from_end + 2]]
    return Mixes("shifts the tokens") if any(ends) else axis


def linear(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    if name != "input":
        return UNKNOWN
    return Mixes("sums over the tokens") if axis.dim == len(call.shape(node)) - 1 else axis


def product(first: str, second: str) -> Rule:
    """Matrix products: `first` [..., n, k] times `second` [..., k, m], plus what else there is, broadcast to the result."""

    def rule(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
        if name not in (first, second):
            return pointwise(call, name, node, axis)
        rank, other = len(call.shape(node)), len(call.shape(call.arguments[second if name == first else first]))
        from_end = rank - 1 - axis.dim
        summed = 0 if name == first or rank == 1 else 1
        if from_end == summed:
            return Mixes("sums over the tokens")
        if from_end == 1 and other == 1:
            from_end = 0  # a matrix times a vector
        if from_end == 0 and other == 1:
            return Axis(len(call.result) - 1, axis.outer, axis.inner)
        return Axis(len(call.result) - 1 - from_end, axis.outer, axis.inner)

    return rule


def embedded(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    return axis if name == "indices" else UNKNOWN


def along_index(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """gather, scatter ...: every argument has the dims of the result, and entries move along `dim` only."""
    dim = call.arguments["dim"] % len(call.result)
    shapes = {call.shape(argument)[axis.dim] for _, argument in call.tensors()}
    return axis if dim != axis.dim and len(shapes) == 1 else UNKNOWN


def index_selected(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    dim = call.arguments["dim"] % len(call.result)
    return axis if name == "self" and dim != axis.dim else UNKNOWN


def indexed(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    """index: tensors that look up neighbouring dims of a table. Where their tokens lie, there they lie in the result."""
    indices = call.arguments["indices"]
    places = [place for place, index in enumerate(indices) if index is not None]
    if places != list(range(places[0], places[-1] + 1)) or any(
        index.meta["val"].dtype == torch.bool for index in indices if index is not None
    ):
        return UNKNOWN
    width = max(len(call.shape(index)) for index in indices if index is not None)
    if name == "indices":
        return Axis(places[0] + width - len(call.shape(node)) + axis.dim, axis.outer, axis.inner)
    if axis.dim in places:
        return UNKNOWN
    return Axis(axis.dim + (width - len(places) if axis.dim > places[-1] else 0), axis.outer, axis.inner)


def unfolded(call: Call, name: str, node: Node, axis: Axis) -> Outcome:
    dim = call.arguments["dimension"] % len(call.shape(node))
    return Mixes("takes windows of tokens") if dim == axis.dim else axis


# -- the table --------------------------------------------------------------------------------------------------------


def _entries(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


TABLE: dict[str, Rule] = {
    **_entries(
        pointwise,
        "where.self where.ScalarOther where.ScalarSelf where.Scalar masked_fill __and__ __or__ __xor__ __lshift__ __rshift__ floor_divide "
        "true_divide expand broadcast_to copy rsub complex polar isclose max.other min.other",
    ),
    **_entries(like_other, "type_as expand_as"),
    **_entries(
        same_shape,
        "to _to_copy contiguous clone alias detach dropout native_dropout alpha_dropout lift_fresh lift_fresh_copy view_as_complex "
        "view_as_real tril triu hardswish softplus prelu one_hot bernoulli resolve_conj resolve_neg view.dtype",
    ),
    **_entries(
        shape_only,
        "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full "
        "sym_size sym_numel sym_stride",
    ),
    **_entries(
        over_dims,
        "softmax _softmax log_softmax _log_softmax _safe_softmax sum nansum mean nanmean amax amin aminmax max min "
        "var std var_mean std_mean norm linalg_vector_norm logsumexp prod argmax argmin any all count_nonzero median nanmedian kthvalue "
        "mode cumsum cumprod cummax cummin logcumsumexp topk sort argsort msort flip roll glu diff",
    ),
    **_entries(normalised, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    **_entries(sliced, "slice narrow narrow_copy"),
    **_entries(divided, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk tensor_split"),
    **_entries(dim_removed, "select unbind"),
    **_entries(joined, "cat concat concatenate"),
    **_entries(stacked, "stack"),
    **_entries(inserted_slice, "slice_scatter select_scatter"),
    **_entries(row_major, "view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze ravel"),
    **_entries(permuted, "permute"),
    **_entries(transposed, "transpose swapaxes swapdims t mT adjoint mH"),
    **_entries(reversed_dims, "numpy_T"),
    **_entries(repeated, "repeat tile"),
    **_entries(repeat_interleaved, "repeat_interleave"),
    **_entries(padded, "constant_pad_nd pad"),
    **_entries(linear, "linear"),
    **_entries(product("self", "other"), "matmul"),
    **_entries(product("self", "mat2"), "mm bmm"),
    **_entries(product("mat1", "mat2"), "addmm"),
    **_entries(product("batch1", "batch2"), "baddbmm"),
    **_entries(embedded, "embedding"),
    **_entries(along_index, "gather scatter scatter_add scatter_reduce take_along_dim"),
    **_entries(index_selected, "index_select"),
    **_entries(indexed, "index"),
    **_entries(unfolded, "unfold"),
    **_entries(
        attends,
        "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _native_multi_head_attention",
    ),
}
"""What is neither here nor pointwise is tried out (`ad_core.graph.probe`)."""

OF_FIRST = frozenset(
    (
        same_shape,
        sliced,
        divided,
        dim_removed,
        row_major,
        permuted,
        transposed,
        reversed_dims,
        repeated,
        repeat_interleaved,
        normalised,
        padded,
        unfolded,
    )
)
"""Rules that speak of an op's first argument only."""
