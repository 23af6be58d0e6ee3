"""From an exported program to the plain graph that everything after capture works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from ad_core.api.errors import CaptureError
from ad_core.capture.repeats import MARK, RepeatPlan, TracedBlock, traced_blocks
from ad_core.graph.edit import tensor_path

_DROPPED = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten.sym_constrain_range.default,
    }
)
"""Checks of what the trace assumed of shapes and dtypes. The capture verifier checks numbers at other shapes instead."""


@dataclass(frozen=True)
class Origin:
    """The module that was exported: its class, its tensors by every name, and what the exported wrapper puts before the names."""

    kind: str
    tensors: Mapping[str, torch.Tensor]
    prefix: str = ""

    @classmethod
    def of(cls, module: nn.Module, prefix: str = "") -> Origin:
        """Taken before anything stands in for the module's tensors."""
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return cls(type(module).__name__, dict(tensors), prefix)


def flatten(program: ExportedProgram, origin: Origin, inputs: list[str], plan: RepeatPlan) -> GraphModule:
    """The program as one `GraphModule` with plain inputs, named `inputs` in order, and one output.

    Weights are `get_attr` nodes under the names they have in the module (tied ones under the first), and the graph holds the module's
    own tensors (meta or real), not copies. Blocks that were skipped are filled in as `plan` says. Metas kept: `val`, `stack_trace`, and
    `nn_module_stack` as {path: (path, class)} with the module's paths. A buffer that is filled anew before anything reads it is what
    it is filled with. Raises `CaptureError` if the forward writes to its weights, other buffers or inputs, `RepeatError` if the marks
    of blocks are not as planned.
    """
    names_of = {spec.arg.name: str(spec.target or spec.arg.name) for spec in program.graph_signature.input_specs}
    kept = [str(spec.target) for spec in program.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]
    filled = _filled_anew(program)
    kept += [names_of[owner.name] for _, owner in _writes(program) if owner.name in names_of and owner not in filled]
    if kept:
        names = dict.fromkeys(name.removeprefix(origin.prefix) for name in kept)
        raise CaptureError(
            f"the forward of {origin.kind} writes to what it keeps: {', '.join(names)}",
            why="a graph of one forward has no memory between calls",
            hint="make the forward compute the value anew, or do not store it",
        )
    return _Flattener(program, origin, inputs, plan).run()


class _Flattener:
    def __init__(self, program: ExportedProgram, origin: Origin, names: list[str], plan: RepeatPlan):
        self._program, self._origin, self._prefix, self._names, self._plan = program, origin, origin.prefix, names, plan
        firsts: dict[int, str] = {}
        self._first_name = {path: firsts.setdefault(id(tensor), path) for path, tensor in origin.tensors.items()}
        self._graph = Graph()
        self._env: dict[Node, Node] = {}
        self._paths: dict[Node, str] = {}
        self._weights: dict[str, Node] = {}
        self._attributes: dict[str, Any] = {}
        self._filled = _filled_anew(program)

    def run(self) -> GraphModule:
        nodes = list(self._program.graph.nodes)
        blocks = traced_blocks(nodes, self._plan)
        self._inputs(nodes)
        copies: dict[int, Callable[[Node], Node]] = {}
        for node in nodes:
            if node.op == "placeholder" or node.target in _DROPPED:
                continue
            if node.op == "output":
                (result,) = node.args[0]
                self._graph.output(self._get(result))
            elif node.args and node.args[0] in self._filled and node.target is _FILL:
                self._env[node] = self._env[node.args[0]] = self._fill(node)
            elif node.target is not MARK:
                self._env[node] = self._copy(node, self._get)
            else:
                self._unmark(node, blocks, copies)
        self._graph.eliminate_dead_code()
        used = {node.target for node in self._graph.nodes if node.op == "get_attr"}
        attributes = {name: tensor for name, tensor in self._attributes.items() if name in used}
        graph_module = GraphModule(attributes, self._graph, class_name=self._origin.kind)
        graph_module.graph.lint()
        return graph_module

    def _inputs(self, nodes: list[Node]) -> None:
        specs = {spec.arg.name: spec for spec in self._program.graph_signature.input_specs}
        names = iter(self._names)
        for node in nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                self._env[node] = self._graph.placeholder(next(names))
                self._env[node].meta = {"val": node.meta["val"]}
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                path = str(spec.target).removeprefix(self._prefix)
                if path not in self._origin.tensors:  # a constant that tracing lifted
                    constant = self._program.constants[str(spec.target)]
                    if isinstance(constant, FakeTensor) or constant.is_meta:
                        raise CaptureError(
                            f"{path!r} of {self._origin.kind} is a tensor without a value",
                            why="the module keeps it as a plain attribute, and it was built without memory",
                            hint="register it as a buffer",
                        )
                    path = path.replace(".", "_")
                    self._attributes[path] = constant
                self._paths[node] = path
            else:
                raise CaptureError(
                    f"the exported graph has an input of kind {spec.kind.name}: {spec.target}", hint="only tensors can be captured"
                )

    def _get(self, node: Node) -> Node:
        if node in self._paths and node not in self._env:
            return self._weight(self._paths[node], node)
        return self._env[node]

    def _fill(self, node: Node) -> Node:
        """What a buffer holds after it was filled. A copy, for what it was filled with may be written to later."""
        source = self._get(node.args[1])  # type: ignore[arg-type]
        value = self._graph.call_function(torch.ops.aten.to.dtype, (source, node.meta["val"].dtype), {"copy": True})
        value.meta = {"val": node.meta["val"], "nn_module_stack": self._module_stack(node, "", "")}
        return value

    def _weight(self, path: str, like: Node) -> Node:
        """The one `get_attr` node of a weight, made where it is first used."""
        path = self._first_name.get(path, path)
        if path not in self._weights:
            target = path if path in self._attributes else tensor_path(path)
            if target not in self._attributes:
                self._attributes[target] = self._origin.tensors[path]
            node = self._graph.get_attr(target)
            node.meta = {"val": like.meta["val"]}
            self._weights[path] = node
        return self._weights[path]

    def _copy(self, node: Node, get: Callable[[Node], Node], old: str = "", new: str = "") -> Node:
        copy = self._graph.node_copy(node, get)
        copy.meta = {key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta}
        copy.meta["nn_module_stack"] = self._module_stack(node, old, new)
        return copy

    def _module_stack(self, node: Node, old: str, new: str) -> dict[str, tuple[str, str]]:
        """By path: (path, class). The wrapper is left out, and of a copied block the paths are its own."""
        stack = {}
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if not (path + ".").startswith(self._prefix):
                continue
            path = path.removeprefix(self._prefix.rstrip(".")).removeprefix(".")
            if old and (path == old or path.startswith(old + ".")):
                path = new + path.removeprefix(old)
            stack[path] = (path, kind)
        return stack

    def _unmark(self, node: Node, blocks: dict[int, TracedBlock], copies: dict[int, Callable[[Node], Node]]) -> None:
        like, inputs, number, _ = node.args
        if number not in self._plan.models:
            self._env[node] = self._get(like)  # type: ignore[arg-type]
            return
        block = blocks[self._plan.models[number]]  # type: ignore[index]
        if number not in copies:
            copies[number] = self._copy_block(number, block, inputs)  # type: ignore[arg-type, index]
        original = block.outputs[node.args[3]]  # type: ignore[index]
        self._env[node] = copies[number](original)  # type: ignore[index]

    def _copy_block(self, number: int, block: TracedBlock, inputs: list[Node]) -> Callable[[Node], Node]:
        old, new = self._plan.copied_path(number)
        leaves = self._plan.varying[self._plan.models[number]]
        local = {block.inputs[leaf]: self._get(node) for leaf, node in zip(leaves, inputs, strict=True) if leaf in block.inputs}

        def get(node: Node) -> Node:
            if node in local:
                return local[node]
            path = self._paths.get(node, "")
            if path.startswith(old + "."):
                return self._weight(new + path.removeprefix(old), node)
            return self._get(node)

        for node in block.nodes:
            if node.target in _DROPPED:
                continue
            if _is_size(node) and all(get(parent) is self._get(parent) for parent in node.all_input_nodes):
                local[node] = self._env[node]  # sizes are the same in every block: tracing computes them once
            else:
                local[node] = self._copy(node, get, old, new)
        return get


def _is_size(node: Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))


_FILL = torch.ops.aten.copy_.default


def _writes(program: ExportedProgram) -> Iterator[tuple[Node, Node]]:
    """The nodes that write to memory, with the node that owns it, of which the op may see a view."""
    for node in program.graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                yield node, _owner(value)


def _filled_anew(program: ExportedProgram) -> set[Node]:
    """The buffers that are only ever written to as a whole, and for the first time before they are read: no call sees what the one before
    it left there."""
    buffers = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.BUFFER}
    found: set[Node] = set()
    for node, owner in _writes(program):
        first = next(reader for reader in program.graph.nodes if owner in reader.all_input_nodes and reader.target not in _DROPPED)
        if owner.name in buffers and (first is node or owner in found):
            found.add(owner)
    return {owner for owner in found if all(_fills(node, owner) for node, written in _writes(program) if written is owner)}


def _fills(node: Node, owner: Node) -> bool:
    source = node.args[1] if node.target is _FILL and node.args[0] is owner else None
    return isinstance(source, Node) and bool(source.meta["val"].shape == owner.meta["val"].shape)


def _owner(node: Node) -> Node:
    while isinstance(node.target, OpOverload) and node.target._schema.returns and node.target._schema.returns[0].alias_info is not None:
        first = node.args[0]
        if not isinstance(first, Node):
            break
        node = first
    return node
