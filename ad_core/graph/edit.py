"""Small, safe edits of a graph: weights by path, new nodes that come with their fake value, dead code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from ad_core.graph.ops import qualified_name

# -- weights and constants --------------------------------------------------------------------------------------------


def tensor_at(graph: GraphModule, path: str) -> torch.Tensor | None:
    """The tensor under "model.layers.0.weight", or None if there is none."""
    owner: Any = graph
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner if isinstance(owner, torch.Tensor) else None


_TAKEN = frozenset(dir(GraphModule(torch.nn.Module(), Graph()))) - set(dir(torch.nn.Module()))
"""Names that a graph keeps for itself."""


def tensor_path(name: str) -> str:
    """Where a graph keeps the tensor that its module calls `name`: there too, unless a part of the module has a name of the graph's own."""
    first, dot, rest = name.partition(".")
    return f"{first}_{dot}{rest}" if first in _TAKEN else name


def set_tensor(graph: GraphModule, path: str, value: torch.Tensor) -> None:
    """Puts `value` under a path in the place of what is there; modules on the way are made. The graph holds it, nothing is copied.

    A parameter stays a parameter if `value` is one; everything else becomes a buffer.
    """
    *parents, leaf = path.split(".")
    owner: torch.nn.Module = graph
    for part in parents:
        if not isinstance(getattr(owner, part, None), torch.nn.Module):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    delete_tensor(graph, path)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def delete_tensor(graph: GraphModule, path: str) -> None:
    """Lets go of the tensor under a path. Does nothing if there is none."""
    parent, _, leaf = path.rpartition(".")
    try:
        owner = graph.get_submodule(parent)
    except AttributeError:
        return
    if isinstance(getattr(owner, leaf, None), torch.Tensor):
        delattr(owner, leaf)


def free_name(graph: GraphModule, wanted: str) -> str:
    """`wanted`, or `wanted_1` ... if the graph module has that attribute already."""
    name, count = wanted, 0
    while hasattr(graph, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


def tensors_read(graph: GraphModule) -> dict[str, list[Node]]:
    """The `get_attr` nodes by the path that they read."""
    found: dict[str, list[Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), []).append(node)
    return found


# -- nodes ------------------------------------------------------------------------------------------------------------


def insert_call(before: Node, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """A new call just before `before`, with its fake value computed from those of its arguments.

    It is said to come from where `like` (by default `before`) comes from. Raises what the op's fake raises.
    """
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    origin = like if like is not None else before
    node.meta = {key: origin.meta[key] for key in ("nn_module_stack", "stack_trace") if key in origin.meta}
    refresh_value(node)
    return node


def refresh_value(node: Node) -> None:
    """Computes the node's fake value anew from those of its arguments. Raises what the op's fake raises."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda parent: parent.meta["val"])
    mode = fake_mode_of([parent.meta.get("val") for parent in node.all_input_nodes])
    with mode, torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """The mode that these fake values live in; a fresh one if there is no fake tensor among them."""
    for value in values:
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, FakeTensor):
                return item.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def replace(node: Node, by: Node) -> None:
    """Every reader of `node` reads `by` instead, and `node` is gone."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def find_input(graph: GraphModule, name: str) -> Node | None:
    """The placeholder of that name."""
    return next((node for node in graph.graph.nodes if node.op == "placeholder" and node.target == name), None)


def new_input(graph: GraphModule, name: str, value: Any) -> Node:
    """A placeholder after the others, with its fake value."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    anchor = placeholders[-1].next if placeholders else next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(anchor):
        node = graph.graph.placeholder(name)
    node.meta["val"] = value
    return node


def output_node(graph: Graph) -> Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def live_nodes(graph: Graph) -> set[Node]:
    """What the output needs."""
    live: set[Node] = set()
    pending = [output_node(graph)]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += node.all_input_nodes
    return live


def remove_dead_code(graph: GraphModule) -> int:
    """Removes what neither the output nor a mutation needs; placeholders stay. The number of nodes that went."""
    removed = 0
    for node in reversed(graph.graph.nodes):
        if node.op in ("call_function", "get_attr", "call_module") and not node.users and not mutates(node):
            graph.graph.erase_node(node)
            removed += 1
    return removed


def mutates(node: Node) -> bool:
    """Whether the node writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def is_op(node: Node, *names: str) -> bool:
    """Whether the node calls one of these ops, named without the overload: "aten::view"."""
    return node.op == "call_function" and qualified_name(node.target) in names


def flat_module(exported: GraphModule) -> GraphModule:
    """`ExportedProgram.module()` without its pytree signature and guards: inputs and outputs are flat from here on.

    A new module around the same graph and the same tensors: the old one's hooks check the inputs of the old signature.
    """
    graph = exported.graph
    graph.set_codegen(CodeGen())
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        graph.erase_node(node)
    return GraphModule(exported, graph)
