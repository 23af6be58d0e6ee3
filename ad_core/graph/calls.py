"""From a graph node to an `OpCall`, and back to nodes: arguments by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ad_core.api.types import OpCall
from ad_core.graph.ops import qualified_name


def bound_arguments(node: Node) -> dict[str, Any]:
    """Every argument of the node's op by name, defaults filled in: nodes and constants."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {argument.name: argument.default_value if argument.has_default_value() else None for argument in schema}
    values.update(zip((argument.name for argument in schema), node.args, strict=False))
    values.update(node.kwargs)
    return values


def op_call(node: Node) -> OpCall:
    """The node as plugins see it, with fake tensors (and SymInts) in the place of nodes."""

    def fake(value: Any) -> Any:
        return value.meta.get("val") if isinstance(value, Node) else value

    arguments = {name: torch.fx.node.map_aggregate(value, fake) for name, value in bound_arguments(node).items()}
    return OpCall(node.name, module_path(node), qualified_name(node.target), arguments)


def module_path(node: Node) -> str:
    """Where in the author's module the node comes from: "model.layers.3.self_attn", or "" if it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def module_class(node: Node) -> str:
    """The class of that module, qualified, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = [kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}" for _, kind in stack.values()]
    return kinds[-1] if kinds else ""
