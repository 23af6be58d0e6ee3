"""Lays the weights of linear layers out as the CPU's matrix kernels want them, once, when the engine starts.

`aten.linear` on the CPU packs its weight at every call, or takes a slow path. oneDNN's packed linear (`torch.ops.mkldnn`) takes a weight
that is packed already, in one layout for any number of tokens. For bfloat16 that is 1.2 to 1.9 times faster from one token to a few dozen
and no slower at hundreds. For float32 it gains from four tokens on and loses at one, so float32 stays unless the option `float32` asks.

Linears that read the same input (queries, keys and values; gate and up) become one with the rows of all their weights: another 1.1 to
1.2 times, since a small product costs more to start than to compute.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Declined, Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import delete_tensor, insert_call, is_op, replace, set_tensor, tensor_at, tensors_read

aten = torch.ops.aten

DUPLICATE_BYTES = 128 << 20
DUPLICATE_SHARE = 0.1
"""What copies of weights that something else reads too (a tied embedding) may take: this many bytes or this share of all weights,
whichever is more."""


class PrepackLinears(Pass):
    """Replaces `linear` on the CPU by oneDNN's packed linear, weight by weight; a weight that nothing else reads is let go.

    Options: `duplicate_bytes` (see `DUPLICATE_BYTES`), `float32` (default False), `merge` (default True: one linear for those that
    read the same input).
    """

    name = "core.prepack"
    stage = Stage.COMPILE
    safety = "reordered"
    requires_ops = ("aten::linear",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        if context.device.type != "cpu":
            report.declined.append(f"the model runs on {context.device}: packed linears are the CPU's")
            return report
        weights = _weights(graph)
        total = sum(weight.bytes for weight in weights)
        budget = int(context.options.get("duplicate_bytes", max(DUPLICATE_BYTES, int(total * DUPLICATE_SHARE))))
        refused: dict[str, int] = {}
        duplicated = held = 0
        packable = []
        for weight in weights:
            reason = _why_not(graph, weight, budget - duplicated, bool(context.options.get("float32", False)))
            if reason is not None:
                refused[reason] = refused.get(reason, 0) + 1
                continue
            duplicated += weight.bytes if weight.other_readers else 0
            packable.append(weight)
        groups = _siblings(packable) if context.options.get("merge", True) else [[weight] for weight in packable]
        for group in groups:
            report.matched += sum(len(weight.linears) for weight in group)
            for weight, released in zip(group, _pack(graph, group), strict=True):
                held += 0 if released or weight.other_readers else weight.bytes
        report.declined += [f"{count} weight{'s' if count > 1 else ''}: {reason}" for reason, count in refused.items()]
        merged = [group for group in groups if len(group) > 1]
        if merged:
            report.notes.append(f"{sum(map(len, merged))} linears that share their input with others became {len(merged)}")
        if duplicated:
            report.notes.append(
                f"{duplicated / 2**20:.1f} MiB of weights that others read too are there twice, of {budget / 2**20:.1f} MiB allowed"
            )
        if held:
            report.notes.append(
                f"{held / 2**20:.1f} MiB of weights are also held outside the graph, by the module that lent them, and stay"
            )
        return report


@dataclass
class _Weight:
    """One weight in memory: the paths under which the graph holds it, the linears that use it, and what else reads its storage."""

    paths: list[str]
    bytes: int
    linears: list[Node] = field(default_factory=list)
    other_readers: list[Node] = field(default_factory=list)


def _weights(graph: GraphModule) -> list[_Weight]:
    """The weights of all linears, in graph order. No tensor is held on to."""
    found: dict[tuple[int, int | torch.SymInt, torch.Size], _Weight] = {}
    readers: dict[int, list[Node]] = {}
    for path, nodes in tensors_read(graph).items():
        tensor = tensor_at(graph, path)
        if tensor is None or tensor.layout != torch.strided or tensor.is_meta:
            continue
        storage = tensor.untyped_storage().data_ptr()
        weight = found.setdefault((storage, tensor.storage_offset(), tensor.shape), _Weight([], tensor.numel() * tensor.element_size()))
        weight.paths.append(path)
        for node in nodes:
            for user in node.users:
                (weight.linears if _is_linear_of(user, node) else readers.setdefault(storage, [])).append(user)
    for (storage, _, _), weight in found.items():
        weight.other_readers = readers.get(storage, [])
    return [weight for weight in found.values() if weight.linears]


def _is_linear_of(user: Node, weight: Node) -> bool:
    return is_op(user, "aten::linear") and user.args[1] is weight and user.args[0] is not weight and weight not in user.args[2:]


def _why_not(graph: GraphModule, weight: _Weight, budget: int, float32: bool) -> str | None:
    tensor = tensor_at(graph, weight.paths[0])
    assert tensor is not None
    if tensor.dim() != 2:
        return f"has {tensor.dim()} dimensions"
    if tensor.dtype == torch.float32 and not float32:
        return "is float32, for which a packed linear is slower at one token (option float32 = true packs it)"
    unsupported = _unsupported(tensor.dtype)
    if unsupported is not None:
        return unsupported.reason
    for node in weight.linears:
        arguments = bound_arguments(node)
        operands = [arguments["input"], arguments["bias"]]
        if any(isinstance(operand, Node) and operand.meta["val"].dtype != tensor.dtype for operand in operands):
            return "meets an input of another dtype"
    if weight.other_readers and weight.bytes > budget:
        size, left = (f"{amount / 2**20:.1f} MiB" for amount in (weight.bytes, budget))
        return f"is also read by {weight.other_readers[0].name}: a copy of {size} does not fit what is left for copies ({left})"
    return None


def _unsupported(dtype: torch.dtype) -> Declined | None:
    """Why packed linears do not work for this dtype here, found by packing a tiny weight."""
    if not torch._C._has_mkldnn:
        return Declined("this build of torch has no oneDNN")
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
    except (RuntimeError, AttributeError) as error:
        return Declined(f"{dtype} is not packed on this CPU: {str(error).splitlines()[0]}")
    return None


def _siblings(weights: Sequence[_Weight]) -> list[list[_Weight]]:
    """The weights in groups that one linear can read, in graph order: of one linear each, with the same input, a bias all or none."""
    groups: dict[Hashable, list[_Weight]] = {}
    for weight in weights:
        arguments = bound_arguments(weight.linears[0])
        bias = arguments["bias"]
        alone = len(weight.linears) > 1 or weight.other_readers or not (bias is None or bias.op == "get_attr")
        key = id(weight) if alone else (arguments["input"], bias is None)
        groups.setdefault(key, []).append(weight)
    return list(groups.values())


def _pack(graph: GraphModule, weights: Sequence[_Weight]) -> list[bool]:
    """Swaps the linears of one weight, or of several that are one linear each with a common input. Whether the memory of each unpacked
    weight is free afterwards."""
    tensors = [tensor_at(graph, weight.paths[0]) for weight in weights]
    rows = [tensor.shape[0] for tensor in tensors if tensor is not None]
    biases = []
    path = f"{weights[0].paths[0]}_packed"
    set_tensor(graph, path, torch.ops.mkldnn._reorder_linear_weight(_joined(tensors), None))
    if len(weights) == 1:
        for node in weights[0].linears:
            replace(node, _packed_linear(node, path, bound_arguments(node)["bias"]))
    else:
        biases = _merge([weight.linears[0] for weight in weights], rows, path)
    storages = [weakref.ref(tensor) for tensor in tensors if tensor is not None]
    tensors.clear()
    paths = [path for weight in weights for path in weight.paths] + biases
    for read in _dead_reads(graph, paths):
        graph.graph.erase_node(read)
    still_read = tensors_read(graph)
    for each in paths:
        if each not in still_read:
            delete_tensor(graph, each)
    return [storage() is None for storage in storages]


def _merge(linears: Sequence[Node], rows: Sequence[int], path: str) -> list[str]:
    """One linear with the packed weight of all, just before the first of them; each of them becomes its part of the result. The paths
    of biases that were joined too."""
    first = min(linears)
    graph = first.graph.owning_module
    assert graph is not None
    bias: Node | None = None
    biases = [each for each in (bound_arguments(node)["bias"] for node in linears) if each is not None]
    if biases:
        set_tensor(graph, f"{path}_bias", _joined([tensor_at(graph, str(each.target)) for each in biases]))
        with first.graph.inserting_before(first):
            bias = first.graph.get_attr(f"{path}_bias")
        bias.meta["val"] = biases[0].meta["val"].new_empty(sum(rows))
    call = _packed_linear(first, path, bias, sum(rows))
    split = insert_call(first, aten.split_with_sizes.default, call, list(rows), -1)
    parts = [insert_call(first, operator.getitem, split, number, like=node) for number, node in enumerate(linears)]
    for node, part in zip(linears, parts, strict=True):
        _reshape_views(node)
        replace(node, part)
    return [str(each.target) for each in biases]


def _packed_linear(node: Node, path: str, bias: Node | None, width: int | None = None) -> Node:
    """The call in the place of the linear `node`, `width` wide if not as wide as that."""
    arguments = bound_arguments(node)
    with node.graph.inserting_before(node):
        packed = node.graph.get_attr(path)
        packed.meta = dict(arguments["weight"].meta)
        call = node.graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (arguments["input"], packed, bias, "none", [], ""))
    call.meta = dict(node.meta)
    if width is not None:
        value = node.meta["val"]
        call.meta["val"] = value.new_empty(*value.shape[:-1], width)
    return call


def _reshape_views(node: Node) -> None:
    """What `node` gives will not be contiguous any more: views of it that need that may copy instead."""
    for user in list(node.users):
        if is_op(user, "aten::view"):
            user.target = aten.reshape.default
        if is_op(user, *_VIEWS) or user.target is operator.getitem:
            _reshape_views(user)


_VIEWS = tuple(
    f"aten::{name}" for name in "reshape view transpose permute unsqueeze squeeze expand slice select split split_with_sizes chunk".split()
)


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """One below the other; a single one is not copied."""
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    assert len(present) == len(tensors)
    return present[0] if len(present) == 1 else torch.cat(present)


def _dead_reads(graph: GraphModule, paths: list[str]) -> Iterator[Node]:
    return (node for node in list(graph.graph.nodes) if node.op == "get_attr" and str(node.target) in paths and not node.users)
