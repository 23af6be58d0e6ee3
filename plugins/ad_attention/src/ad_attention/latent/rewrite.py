"""The pass that finds latent attention: keys and values that are one linear of a small vector become `ad_attention::mla`.

What lies between that linear and the attention only moves numbers about: it is run once with every number labelled, and the labels tell
where each feature of each key and value comes from. So any spelling counts, and nothing else passes for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_attention.match.evaluate import Evaluation, Sizes, Unknown
from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.graph.calls import bound_arguments, module_path
from ad_core.graph.edit import insert_call, remove_dead_code, replace
from ad_core.graph.ops import find_op, qualified_name

aten = torch.ops.aten

SOURCES = ("ad_attention::attention", "ad_attention::selected")
KEPT = ("window", "sinks", "selected")
"""Modifiers that latent attention has too. With any other the attention stays as it is."""

BATCH, LENGTH = 2, 3
"""Sizes at which the labels are run."""
FOREIGN = 1 << 40
"""Labels of the rope part start here."""

VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand transpose permute contiguous clone alias detach "
        "swapaxes movedim view_as expand_as"
    ).split()
)
EMPTY = frozenset({"aten::new_empty", "aten::empty", "aten::new_zeros", "aten::zeros"})
MOVES = VIEWS | EMPTY | {f"aten::{name}" for name in "slice select split split_with_sizes chunk cat slice_scatter copy".split()}


class FindLatent(Pass):
    """Replaces attention over an expanded latent by attention over the latent, which is all that is then kept."""

    name = "attention.mla"
    stage = Stage.MATCH
    safety = "reordered"

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report, sizes = PassReport(), Sizes(graph)
        evaluation = Evaluation(graph, sizes, BATCH, LENGTH)
        for node in list(graph.graph.nodes):
            if qualified_name(node.target) not in SOURCES:
                continue
            arguments = bound_arguments(node)
            linear = _linear_above(arguments["value"])
            if linear is None or not _narrows(linear, arguments):
                continue  # keys and values of their own: nothing to save, and nothing to report
            try:
                found = _read(arguments, linear, evaluation)
            except Unknown as why:
                report.declined.append(f"{node.name} in {module_path(node) or 'the model'} keeps expanded keys and values: {why}")
                continue
            _write(node, arguments, found)
            report.matched += 1
        if report.matched:
            remove_dead_code(graph)
        return report


@dataclass(frozen=True)
class _Latent:
    """`linear` expands its input; `rope` is the part of the keys that all heads share; the `nope` features of a key come first or last."""

    linear: Node
    rope: Node
    nope: slice
    roped: slice


def _linear_above(node: Node) -> Node | None:
    """The linear without a bias that `node` only moves about, if it is one."""
    while node.target is not aten.linear.default:
        if not _moves(node) or node.target is aten.cat.default:
            return None
        node = node.args[0]  # type: ignore[assignment]
        if not isinstance(node, Node):
            return None
    weight = node.args[1]
    plain = len(node.args) < 3 or node.args[2] is None
    return node if plain and not node.kwargs and isinstance(weight, Node) and weight.op == "get_attr" else None


def _narrows(linear: Node, arguments: Mapping[str, Any]) -> bool:
    """Whether the linear's input is smaller than the keys and values."""
    key, value = (arguments[name].meta["val"] for name in ("key", "value"))
    width = linear.args[1].meta["val"].shape[1]  # type: ignore[union-attr]
    return bool(width < key.shape[2] * (key.shape[3] + value.shape[3]))


def _read(arguments: Mapping[str, Any], linear: Node, evaluation: Evaluation) -> _Latent:
    """Raises `Unknown` with what is different from latent attention."""
    for name, value in arguments.items():
        if name not in (*KEPT, "query", "key", "value", "scale", "rel_bias_rule") and value is not None:
            raise Unknown(f"it has {name}")
    key, value = arguments["key"], arguments["value"]
    heads, width = (int(size) for size in key.meta["val"].shape[2:])
    value_width = int(value.meta["val"].shape[3])
    if int(arguments["query"].meta["val"].shape[2]) != heads:
        raise Unknown("its query heads share key heads")
    cone = _cone(key, linear)
    if linear not in cone:
        raise Unknown(f"its value comes from {linear.name} and its key does not")
    rope = _foreign(cone, linear)
    labels = {linear: _labels(linear, evaluation, 0), rope: _labels(rope, evaluation, FOREIGN)}
    for node in cone:  # memory to be filled, in the dtype of the labels
        if qualified_name(node.target) in EMPTY:
            labels[node] = torch.zeros(evaluation.shape(node), dtype=torch.float64)
    dependent = frozenset(cone | _cone(value, linear)) - labels.keys()
    above = evaluation.over(labels, dependent)
    shared = above.value(key)[0, 0, 0] >= FOREIGN
    rope_width, nope_width = int(shared.sum()), width - int(shared.sum())
    roped = slice(nope_width, width) if bool(shared[-1]) else slice(0, rope_width)
    nope = slice(0, nope_width) if bool(shared[-1]) else slice(rope_width, width)
    block = nope_width + value_width
    token = torch.arange(BATCH * LENGTH, dtype=torch.float64).view(BATCH, LENGTH, 1, 1)
    head = torch.arange(heads, dtype=torch.float64).view(-1, 1)
    columns = heads * block
    wanted = torch.empty(BATCH, LENGTH, heads, width, dtype=torch.float64)
    wanted[..., nope] = token * columns + head * block + torch.arange(nope_width)
    wanted[..., roped] = FOREIGN + token * rope_width + torch.arange(rope_width)
    values = token * columns + head * block + nope_width + torch.arange(value_width)
    if labels[linear].numel() != BATCH * LENGTH * columns or labels[rope].numel() != BATCH * LENGTH * rope_width:
        raise Unknown("parts of what the linear gives are used for something else")
    if not torch.equal(above.value(key), wanted) or not torch.equal(above.value(value), values):
        raise Unknown("its keys and values are not the features of one linear, head by head, with a part that all heads share")
    return _Latent(linear, rope, nope, roped)


def _labels(node: Node, evaluation: Evaluation, start: int) -> torch.Tensor:
    shape = evaluation.shape(node)
    if [size for size in shape if size != 1][:2] != [BATCH, LENGTH]:
        raise Unknown(f"{node.name} is not laid out by batch and token")
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) + start


def _cone(node: Node, linear: Node) -> set[Node]:
    """What `node` is made of by moving alone, down to the nodes that compute: these are in it, what they read is not."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in found:
            continue
        found.add(top)
        if top is not linear and _moves(top):
            stack += [needed for needed in top.all_input_nodes if isinstance(needed.meta.get("val"), torch.Tensor | list | tuple)]
    return found


def _foreign(cone: set[Node], linear: Node) -> Node:
    """Where the part of the keys that does not come from the linear enters, above the views that widen it to all heads."""
    made: set[Node] = {linear}
    stack = [linear]
    while stack:
        for user in stack.pop().users:
            if user in cone and user not in made:
                made.add(user)
                stack.append(user)
    joins = {
        needed
        for node in made - {linear}
        for needed in node.all_input_nodes
        if needed in cone and needed not in made and qualified_name(needed.target) not in EMPTY
    }
    if len(joins) != 1:
        names = ", ".join(sorted(node.name for node in joins)) or "nothing"
        raise Unknown(f"its keys join the linear with {names}, and one part is known")
    node = joins.pop()
    while qualified_name(node.target) in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _moves(node: Node) -> bool:
    return node.target is getitem or qualified_name(node.target) in MOVES


def _write(node: Node, arguments: Mapping[str, Any], found: _Latent) -> None:
    query = arguments["query"]
    q_nope, q_rope = (insert_call(node, aten.slice.Tensor, query, 3, part.start, part.stop) for part in (found.nope, found.roped))
    given = {name: arguments[name] for name in KEPT if arguments.get(name) is not None}
    latent = insert_call(
        node,
        find_op("ad_attention::mla"),
        q_nope,
        q_rope,
        _by_token(node, found.linear.args[0]),  # type: ignore[arg-type]
        _by_token(node, found.rope),
        found.linear.args[1],
        scale=arguments["scale"],
        **given,
    )
    replace(node, latent)


def _by_token(before: Node, source: Node) -> Node:
    """[B, S, features] of a tensor that has dimensions of size 1 besides, or several of features."""
    shape = source.meta["val"].shape
    ones = [dim for dim, size in enumerate(shape) if isinstance(size, int) and size == 1]
    if len(shape) > 3 and ones:
        source = insert_call(before, aten.squeeze.dims, source, ones)
    return insert_call(before, aten.flatten.using_ints, source, 2, -1) if source.meta["val"].dim() > 3 else source
