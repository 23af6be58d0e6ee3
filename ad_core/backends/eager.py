"""The eager backend: the graph as one straight-line Python function, with weights and ops bound when it is made.

`fx.GraphModule.forward` looks every weight up through a chain of modules at every call; here a weight is a name. That is
most of what Python costs a small model on a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api.loading import CompileBackend
from ad_core.graph.ops import implementation


class EagerBackend(CompileBackend):
    """Runs node after node. Needs nothing, starts at once."""

    name = "eager"

    def compile(self, graph: GraphModule) -> Callable[..., Any]:
        return _Emitter(graph).function()


class _Emitter:
    """Writes the function's source. Values are freed after their last use."""

    def __init__(self, graph: GraphModule):
        self._graph = graph
        self._bound: dict[str, Any] = {}
        self._names: dict[Node, str] = {}
        self._constants: dict[int, str] = {}

    def function(self) -> Callable[..., Any]:
        nodes = list(self._graph.graph.nodes)
        dies_after = self._last_uses(nodes)
        parameters: list[str] = []
        body: list[str] = []
        for number, node in enumerate(nodes):
            self._names[node] = f"v{number}"
            match node.op:
                case "placeholder":
                    parameters.append(self._names[node])
                case "get_attr":
                    self._names[node] = self._bind(self._attribute(str(node.target)))
                case "call_function":
                    body.append(f"{self._names[node]} = {self._call(node)}")
                case "call_module":
                    module = self._bind(self._graph.get_submodule(str(node.target)))
                    body.append(f"{self._names[node]} = {module}({self._arguments(node)})")
                case "output":
                    body.append(f"return {self._literal(node.args[0])}")
                case other:
                    raise AssertionError(f"no {other} node outlives capture")
            if dead := [self._names[value] for value in dies_after.get(node, ()) if value.op not in ("get_attr", "output")]:
                body.append(f"{' = '.join(dead)} = None")
        source = f"def forward({', '.join(parameters)}):\n    " + "\n    ".join(body)
        exec(compile(source, "<ad eager graph>", "exec"), self._bound)
        forward: Callable[..., Any] = self._bound["forward"]
        return forward

    @staticmethod
    def _last_uses(nodes: list[Node]) -> dict[Node, list[Node]]:
        """For each node the values that nobody reads after it."""
        last: dict[Node, Node] = {}
        for node in nodes:
            for value in node.all_input_nodes:
                last[value] = node
            last.setdefault(node, node)
        dies: dict[Node, list[Node]] = {}
        for value, node in last.items():
            if node.op != "output":
                dies.setdefault(node, []).append(value)
        return dies

    def _call(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"{self._literal(node.args[0])}[{self._literal(node.args[1])}]"
        target = _direct(node.target)
        if isinstance(target, OpOverload) and len(node.args) + len(node.kwargs) == len(target._schema.arguments):
            target = implementation(target) or target  # a call through the dispatcher costs as much as a small product
        return f"{self._bind(target)}({self._arguments(node)})"

    def _arguments(self, node: Node) -> str:
        positional = [self._literal(value) for value in node.args]
        keyword = [f"{name}={self._literal(value)}" for name, value in node.kwargs.items()]
        return ", ".join(positional + keyword)

    def _literal(self, value: Any) -> str:
        """Source for an argument: nodes by name, plain values written out, the rest bound."""
        match value:
            case Node():
                return self._names[value]
            case None | bool() | int() | str():
                return repr(value)
            case float() if value - value == 0:  # infinities and NaN have no literal
                return repr(value)
            case tuple():
                return f"({''.join(self._literal(item) + ', ' for item in value)})"
            case list():
                return f"[{', '.join(self._literal(item) for item in value)}]"
            case slice():
                return f"slice({self._literal(value.start)}, {self._literal(value.stop)}, {self._literal(value.step)})"
            case _:
                return self._bind(value)

    def _bind(self, value: Any) -> str:
        if id(value) not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[id(value)] = name
            self._bound[name] = value
        return self._constants[id(value)]

    def _attribute(self, path: str) -> torch.Tensor:
        value: Any = self._graph
        for part in path.split("."):
            value = getattr(value, part)
        return value.detach() if isinstance(value, torch.nn.Parameter) else value


_FUNCTIONS = (
    "add sub mul div neg pow sqrt rsqrt exp sin cos tanh sigmoid cat transpose permute reshape unsqueeze squeeze split_with_sizes "
    "matmul bmm mean sum softmax embedding where select"
).split()
_METHODS = (torch.ops.aten.to.dtype, torch.ops.aten.view.default, torch.ops.aten.expand.default)


def _direct(target: Any) -> Any:
    """PyTorch's own function or method for an op, where it takes the op's arguments in the op's order: it parses them in half the time."""
    if isinstance(target, OpOverload) and target.namespace == "aten":
        name = target._schema.name.removeprefix("aten::")
        if name in _FUNCTIONS:
            return getattr(torch, name)
        if target in _METHODS:
            return getattr(torch.Tensor, name)
    return target
