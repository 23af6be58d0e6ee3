"""Lays the weights of linear layers out as the CPU's matrix kernels want them, once, when the engine starts.

`aten.linear` on the CPU packs its weight at every call, or takes a slow path. Packed already, bfloat16 is 1.2 to 1.9 times faster from one
token to a few dozen with oneDNN's layout, which every CPU has, and another 1.1 to 2 times with ours (`packing.py`), no slower at hundreds.
For float32 oneDNN gains from four tokens on and loses at one, so float32 stays unless the option `float32` asks.

Linears that read the same input (queries, keys and values; gate and up) become one with the rows of all their weights: a small product
costs more to start than to compute.
"""

from __future__ import annotations

import operator
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import delete_tensor, insert_call, is_op, replace, set_tensor, tensor_at, tensors_read
from ad_core.native.packed import Arena
from ad_core.passes.packing import Layout, Native, OneDnn, packed_embedding

aten = torch.ops.aten

DUPLICATE_BYTES = 128 << 20
DUPLICATE_SHARE = 0.1
"""What copies of weights that something else reads too (a tied embedding) may take: this many bytes or this share of all weights,
whichever is more."""


class PrepackLinears(Pass):
    """Replaces `linear` on the CPU by a packed one, weight by weight; a weight that nothing else reads is let go.

    Options: `duplicate_bytes` (see `DUPLICATE_BYTES`), `float32` (default False), `merge` (default True: one linear for those that
    read the same input), `layouts` (names in the order of preference, by default "native", "oneDNN").
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
        layouts = [_LAYOUTS[name] for name in context.options.get("layouts", _LAYOUTS)]
        packable = []
        for weight in weights:
            reason = _why_not(graph, weight, layouts, budget - duplicated, bool(context.options.get("float32", False)))
            if reason is not None:
                refused[reason] = refused.get(reason, 0) + 1
                continue
            duplicated += weight.bytes if weight.other_readers else 0
            packable.append(weight)
        groups = _siblings(packable) if context.options.get("merge", True) else [[weight] for weight in packable]
        arena = Arena(sum(_packed_bytes(graph, group) for group in groups))
        for group in groups:
            report.matched += sum(len(weight.linears) for weight in group)
            for weight, released in zip(group, _pack(graph, group, arena), strict=True):
                held += 0 if released or weight.other_readers else weight.bytes
        report.declined += [f"{count} weight{'s' if count > 1 else ''}: {reason}" for reason, count in refused.items()]
        for name, count in Counter(weight.layout.name for weight in packable if weight.layout).items():
            report.notes.append(f"{count} weight{'s' if count > 1 else ''} in the layout {name}")
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


_LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Native(), OneDnn())}


@dataclass
class _Weight:
    """One weight in memory: the paths under which the graph holds it, the linears and embeddings that use it, what else reads its
    storage, and the layout that it gets."""

    paths: list[str]
    bytes: int
    linears: list[Node] = field(default_factory=list)
    embeddings: list[Node] = field(default_factory=list)
    other_readers: list[Node] = field(default_factory=list)
    layout: Layout | None = None


def _weights(graph: GraphModule) -> list[_Weight]:
    """The weights of all linears, in graph order. No tensor is held on to."""
    found: dict[tuple[int, int, torch.Size], _Weight] = {}
    readers: dict[int, list[Node]] = {}
    for path, nodes in tensors_read(graph).items():
        tensor = tensor_at(graph, path)
        if tensor is None or tensor.layout != torch.strided or tensor.is_meta:
            continue
        place = _place(tensor)
        weight = found.setdefault(place, _Weight([], tensor.numel() * tensor.element_size()))
        weight.paths.append(path)
        for node in nodes:
            for user in node.users:
                (weight.linears if _is_linear_of(user, node) else readers.setdefault(place[0], [])).append(user)
    for (storage, _, _), weight in found.items():
        weight.other_readers = readers.get(storage, [])
    for path, tensor in graph.named_parameters(remove_duplicate=False):
        same = None if tensor.is_meta else found.get(_place(tensor))
        if same is not None and path not in same.paths:  # nobody reads this name, and it holds the memory as well
            same.paths.append(path)
    return [weight for weight in found.values() if weight.linears]


def _place(tensor: torch.Tensor) -> tuple[int, int, torch.Size]:
    """Where a tensor lies: equal for two that are one."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.shape


def _is_linear_of(user: Node, weight: Node) -> bool:
    return is_op(user, "aten::linear") and user.args[1] is weight and user.args[0] is not weight and weight not in user.args[2:]


def _why_not(graph: GraphModule, weight: _Weight, layouts: Sequence[Layout], budget: int, float32: bool) -> str | None:
    """Why a weight is left as it is; None if it is packed, and then it has its layout."""
    tensor = tensor_at(graph, weight.paths[0])
    assert tensor is not None
    if tensor.dim() != 2:
        return f"has {tensor.dim()} dimensions"
    if tensor.dtype == torch.float32 and not float32:
        return "is float32, for which a packed linear is slower at one token (option float32 = true packs it)"
    reasons = [layout.why_not(tensor) for layout in layouts]
    weight.layout = next((layout for layout, reason in zip(layouts, reasons, strict=True) if reason is None), None)
    if weight.layout is None:
        return "; ".join(filter(None, reasons)) or "no layout is allowed (option layouts)"
    for node in weight.linears:
        arguments = bound_arguments(node)
        operands = [arguments["input"], arguments["bias"]]
        if any(isinstance(operand, Node) and operand.meta["val"].dtype != tensor.dtype for operand in operands):
            return "meets an input of another dtype"
    if weight.layout.embeds:
        weight.embeddings = [node for node in weight.other_readers if _is_embedding_of(node, weight.paths)]
        weight.other_readers = [node for node in weight.other_readers if node not in weight.embeddings]
    if weight.other_readers and weight.bytes > budget:
        size, left = (f"{amount / 2**20:.1f} MiB" for amount in (weight.bytes, budget))
        return f"is also read by {weight.other_readers[0].name}: a copy of {size} does not fit what is left for copies ({left})"
    return None


def _is_embedding_of(node: Node, paths: Sequence[str]) -> bool:
    """Whether a node looks rows of the weight up, and does nothing else with it."""
    if not is_op(node, "aten::embedding"):
        return False
    table, ids = node.args[:2]
    return isinstance(table, Node) and table.op == "get_attr" and str(table.target) in paths and ids is not table


def _siblings(weights: Sequence[_Weight]) -> list[list[_Weight]]:
    """The weights in groups that one linear can read, in graph order: of one linear each, with the same input, a bias all or none."""
    groups: dict[Hashable, list[_Weight]] = {}
    for weight in weights:
        arguments = bound_arguments(weight.linears[0])
        bias = arguments["bias"]
        shared = len(weight.linears) > 1 or weight.embeddings or weight.other_readers
        alone = shared or not (bias is None or bias.op == "get_attr")
        key = id(weight) if alone else (arguments["input"], bias is None, weight.layout)
        groups.setdefault(key, []).append(weight)
    return list(groups.values())


def _packed_bytes(graph: GraphModule, weights: Sequence[_Weight]) -> int:
    layout, tensors = weights[0].layout, [tensor_at(graph, weight.paths[0]) for weight in weights]
    assert layout is not None
    present = [tensor for tensor in tensors if tensor is not None]
    shape = (sum(tensor.shape[0] for tensor in present), present[0].shape[1])
    return Arena.rounded(layout.nbytes(present[0].new_empty(shape, device="meta")))


def _pack(graph: GraphModule, weights: Sequence[_Weight], arena: Arena) -> list[bool]:
    """Swaps the linears of one weight, or of several that are one linear each with a common input. Whether the memory of each unpacked
    weight is free afterwards."""
    layout, tensors = weights[0].layout, [tensor_at(graph, weight.paths[0]) for weight in weights]
    assert layout is not None
    rows = [tensor.shape[0] for tensor in tensors if tensor is not None]
    biases = []
    path = f"{weights[0].paths[0]}_packed"
    joined = _joined(tensors)
    set_tensor(graph, path, layout.pack(joined, arena.take(layout.nbytes(joined))))
    del joined
    if len(weights) == 1:
        for node in weights[0].linears:
            replace(node, _packed_linear(node, layout, path, bound_arguments(node)["bias"], rows[0]))
        for node in weights[0].embeddings:
            packed = _read_packed(node, path, node.args[0])  # type: ignore[arg-type]
            with node.graph.inserting_before(node):
                call = node.graph.call_function(packed_embedding, (packed, node.args[1]))
            call.meta = dict(node.meta)
            replace(node, call)
    else:
        biases = _merge([weight.linears[0] for weight in weights], layout, rows, path)
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


def _merge(linears: Sequence[Node], layout: Layout, rows: Sequence[int], path: str) -> list[str]:
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
    call = _packed_linear(first, layout, path, bias, sum(rows))
    split = insert_call(first, aten.split_with_sizes.default, call, list(rows), -1)
    parts = [insert_call(first, operator.getitem, split, number, like=node) for number, node in enumerate(linears)]
    for node, part in zip(linears, parts, strict=True):
        _reshape_views(node)
        replace(node, part)
    return [str(each.target) for each in biases]


def _packed_linear(node: Node, layout: Layout, path: str, bias: Node | None, width: int) -> Node:
    """The call in the place of the linear `node`, with `width` outputs."""
    arguments = bound_arguments(node)
    packed = _read_packed(node, path, arguments["weight"])
    with node.graph.inserting_before(node):
        call = node.graph.call_function(layout.linear, layout.arguments(arguments["input"], packed, bias, width))
    call.meta = dict(node.meta)
    value = node.meta["val"]
    call.meta["val"] = value.new_empty(*value.shape[:-1], width)
    return call


def _read_packed(before: Node, path: str, weight: Node) -> Node:
    """A read of the packed tensor under `path`, in the place of one of the unpacked `weight`."""
    owner = before.graph.owning_module
    tensor = None if owner is None else tensor_at(owner, path)
    assert tensor is not None
    with before.graph.inserting_before(before):
        packed = before.graph.get_attr(path)
    packed.meta = {**weight.meta, "val": weight.meta["val"].new_empty(tensor.shape)}
    return packed


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
