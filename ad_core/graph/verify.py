"""The written spec of a graph between passes, and its checker.

`RULES` is the spec: a name, what must hold, and the stages between which it holds. A pass may rely on every rule of its stage and
must leave it standing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api.errors import GraphInvalidError
from ad_core.api.types import Stage
from ad_core.graph.axes import TOKEN_INPUTS
from ad_core.graph.calls import module_path
from ad_core.graph.edit import is_op, mutates, output_node, tensor_at

Check = Callable[[GraphModule], Iterator[tuple[Node | None, str]]]

_CHECKS = tuple(
    f"aten::{name}"
    for name in (
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_functional_sym_constrain_range",
        "_functional_sym_constrain_range_for_size",
    )
)


def is_check(node: Node) -> bool:
    """Whether it only checks what export assumed: an assertion, or the guard module of `ExportedProgram.module()`."""
    return (node.op == "call_module" and str(node.target).startswith("_guards_fn")) or is_op(node, *_CHECKS)


@dataclass(frozen=True)
class Violation:
    """A rule that a node (or the graph: "") breaks."""

    rule: str
    node: str
    module: str
    detail: str


@dataclass(frozen=True)
class Rule:
    """One line of the spec. It holds from the end of stage `since` up to the end of stage `until`."""

    name: str
    text: str
    check: Check
    since: Stage = Stage.CAPTURE
    until: Stage = Stage.COMPILE


def violations(graph: GraphModule, stage: Stage, *, complete: bool = True) -> list[Violation]:
    """What breaks the rules that hold once `stage` is done, or (not `complete`) between its passes; empty for a valid graph.

    The graph is not changed.
    """
    found = []
    for rule in RULES:
        if rule.since < stage + complete and stage <= rule.until:
            for node, detail in rule.check(graph):
                found.append(
                    Violation(rule.name, node.name if node is not None else "", module_path(node) if node is not None else "", detail)
                )
    return found


def verify_graph(graph: GraphModule, stage: Stage, *, after: str = "") -> None:
    """Raises `GraphInvalidError` for a graph that breaks its spec. `after` names the pass of the stage that has just run; without
    it the stage is done."""
    found = violations(graph, stage, complete=not after)
    if found:
        shown = [
            f"{entry.node or 'graph'}: {entry.detail} [{entry.rule}]{f' in {entry.module}' if entry.module else ''}" for entry in found[:8]
        ]
        more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
        raise GraphInvalidError(
            f"the graph breaks its spec in {len(found)} place{'s' if len(found) > 1 else ''}",
            where=f"after the pass {after}" if after else f"at the end of stage {stage.name}",
            why="\n         ".join(shown + more),
            hint="the rules are listed in ad_core/graph/verify.py; report the pass that leaves such a graph to its plugin",
        )


# -- checks -----------------------------------------------------------------------------------------------------------


def _well_formed(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    try:
        graph.graph.lint()
    except RuntimeError as error:
        yield None, str(error).splitlines()[0]


def _known_kinds(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output") and not is_check(node):
            yield node, f"is a {node.op} of {node.target}"


def _known_targets(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if node.op != "call_function" or isinstance(node.target, OpOverload) or node.target is operator.getitem:
            continue
        home = getattr(node.target, "__module__", "")
        if home not in ("_operator", "math") and not home.startswith("torch"):
            yield node, f"calls {node.target}, which is no op"
        elif isinstance(node.meta.get("val"), torch.Tensor):
            yield node, f"calls the Python function {getattr(node.target, '__name__', node.target)} on tensors"


def _valued(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "call_function") and node.meta.get("val") is None and not is_check(node):
            yield node, "has no fake value"


def _attributes_exist(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor, value = tensor_at(graph, str(node.target)), node.meta.get("val")
        if tensor is None:
            yield node, f"reads {node.target}, which is not there"
        elif (
            tensor.layout == torch.strided
            and isinstance(value, torch.Tensor)
            and (tensor.shape, tensor.dtype) != (value.shape, value.dtype)
        ):
            yield node, f"reads {node.target}, which is {_kind(tensor)}, as {_kind(value)}"


def _canonical_inputs(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        value = node.meta.get("val")
        if node.target not in TOKEN_INPUTS:
            yield node, f"is no input of a canonical graph: those are {', '.join(TOKEN_INPUTS)}"
        elif isinstance(value, torch.Tensor):
            floating = node.target == "inputs_embeds"
            if value.dim() != 2 + floating or value.is_floating_point() != floating:
                yield node, f"is {_kind(value)}"
    if not {node.target for node in inputs} & {"input_ids", "inputs_embeds"}:
        yield None, "takes neither input_ids nor inputs_embeds"


def _canonical_output(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    result = output_node(graph.graph).args[0]
    if isinstance(result, list | tuple):
        if len(result) != 1:
            yield output_node(graph.graph), f"returns {len(result)} values"
            return
        result = result[0]
    value = result.meta.get("val") if isinstance(result, Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        yield output_node(graph.graph), f"returns {_kind(value) if isinstance(value, torch.Tensor) else value}, not logits [B, S, V]"


def _functional(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if mutates(node):
            yield node, f"{node.target} writes to its arguments"


def _unchecked(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if is_check(node):
            yield node, f"{node.target} is left from export"


def _writes_inputs_only(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        if not mutates(node):
            continue
        arguments = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        for argument in node.target._schema.arguments:
            target = arguments.get(argument.name)
            if argument.is_write and isinstance(target, Node) and target.op != "placeholder":
                yield node, f"writes its argument {argument.name} = {target.name}, which is no pool: a compiler may drop the copy"


def _on_a_device(graph: GraphModule) -> Iterator[tuple[Node | None, str]]:
    for node in graph.graph.nodes:
        constants = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        if any(isinstance(value, torch.device) and value.type == "meta" for value in constants):
            yield node, "names the device meta"
        tensor = tensor_at(graph, str(node.target)) if node.op == "get_attr" else None
        if tensor is not None and tensor.is_meta:
            yield node, f"reads {node.target}, which has no values"


def _kind(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"


# -- the spec ---------------------------------------------------------------------------------------------------------

RULES = (
    Rule("well formed", "nodes stand in the order of their use and belong to the graph", _well_formed),
    Rule("kinds", "nodes are placeholders, weights, calls and the output; no calls of modules or methods", _known_kinds),
    Rule("targets", "calls are of ops, or of Python operators on sizes", _known_targets),
    Rule("attributes", "every weight that is read exists, with the shape and dtype of its fake value", _attributes_exist),
    Rule("values", "every value has its fake", _valued, until=Stage.FUSE),
    Rule("inputs", "the inputs are input_ids or inputs_embeds, and position_ids; no mask, no cache", _canonical_inputs, until=Stage.FUSE),
    Rule("output", "the output is one tensor of logits [B, S, V]", _canonical_output, until=Stage.FUSE),
    Rule("no checks", "no assertions or guards are left", _unchecked, since=Stage.CLEAN),
    Rule("functional", "no op writes to its arguments", _functional, since=Stage.CLEAN, until=Stage.FUSE),
    Rule("real devices", "no weight is on meta and no argument names that device", _on_a_device, since=Stage.LOAD),
    Rule("pools only", "what is written are inputs of the graph", _writes_inputs_only, since=Stage.CACHE),
)
"""The spec. Rules up to FUSE describe the canonical graph; the cached graph computes on packed tokens and keeps its older fakes."""
