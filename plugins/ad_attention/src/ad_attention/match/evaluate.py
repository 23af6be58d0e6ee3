"""Values of nodes that follow from the sizes of the graph's inputs alone: masks, position biases, constant scales.

A graph of shape-only arithmetic is run at lengths of our choice, with `position_ids` counting from zero. Whatever touches token ids,
hidden states or weights raises `Unknown`, which says what it touches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

aten = torch.ops.aten


class Unknown(Exception):
    """A value cannot be told before the model runs. The message says why."""


class TooLong(Unknown):
    """A value cannot be computed at this length: the model is not made for it."""


SHAPE_OF_FIRST = frozenset(
    {
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.ones_like.default,
        aten.zeros_like.default,
        aten.full_like.default,
        aten.empty_like.default,
    }
)
"""Ops that read of their first argument only its shape and dtype."""

SHAPE_OF_SECOND = frozenset({aten.expand_as.default, aten.view_as.default, aten.reshape_as.default, aten.type_as.default, aten.to.other})
"""Ops that read of their second argument only its shape and dtype."""


class Sizes:
    """Concrete shapes of a graph whose batch and length are symbols, for a batch and length of our choice."""

    def __init__(self, graph: GraphModule):
        self._batch: set[Any] = set()
        self._length: set[Any] = set()
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() > 1:
                for symbols, size in ((self._batch, value.shape[0]), (self._length, value.shape[1])):
                    if isinstance(size, torch.SymInt):
                        symbols |= size.node.expr.free_symbols

    @property
    def dynamic(self) -> bool:
        """Whether the graph accepts more than one length."""
        return bool(self._length - self._batch)

    def number(self, size: Any, batch: int, length: int) -> Any:
        """A size (int, SymInt, SymBool or SymFloat) as a plain number. Raises `Unknown` if it depends on more than batch and length."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size
        values = dict.fromkeys(self._batch, batch) | dict.fromkeys(self._length, length)
        expression = size.node.expr.xreplace(values)
        if getattr(expression, "free_symbols", None):
            raise Unknown(f"the size {size} depends on more than the batch and the length")
        kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(size)]
        return kind(expression)

    def shape(self, node: Node, batch: int, length: int) -> tuple[int, ...]:
        """The shape of the node's tensor."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise Unknown(f"{node.name} is not known to be a tensor")
        return tuple(self.number(size, batch, length) for size in value.shape)


class Evaluation:
    """Values at one batch and length, on the CPU, computed when asked for and kept.

    `given` values are used in place of the nodes' own, `integers` replaces integer constants by others of our choice. Values that
    do not depend on `given` are taken from `base`, which is shared.
    """

    def __init__(
        self,
        graph: GraphModule,
        sizes: Sizes,
        batch: int,
        length: int,
        *,
        integers: Mapping[int, int] | None = None,
        base: Evaluation | None = None,
        given: Mapping[Node, torch.Tensor] | None = None,
        dependent: frozenset[Node] = frozenset(),
    ):
        self.batch, self.length = batch, length
        self._graph, self._sizes = graph, sizes
        self._integers = dict(integers or {})
        self._base, self._dependent = base, dependent
        self._values: dict[Node, Any] = dict(given or {})

    def over(self, given: Mapping[Node, torch.Tensor], dependent: frozenset[Node]) -> Evaluation:
        """The same sizes with the values of some nodes given. `dependent`: the nodes whose values follow from these."""
        return Evaluation(
            self._graph, self._sizes, self.batch, self.length, integers=self._integers, base=self, given=given, dependent=dependent
        )

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of the node's tensor at these sizes."""
        return self._sizes.shape(node, self.batch, self.length)

    def value(self, node: Node) -> Any:
        """The value of the node. Not to be written. Raises `Unknown`."""
        if node in self._values:
            return self._values[node]
        if self._base is not None and node not in self._dependent:
            return self._base.value(node)
        # iterative: a chain of thousands of nodes would overflow Python's stack
        stack = [node]
        while stack:
            top = stack[-1]
            missing = [] if top in self._values else [needed for needed in self._needed(top) if not self._has(needed)]
            if missing:
                stack += missing
                continue
            stack.pop()
            if top not in self._values:
                self._values[top] = self._compute(top)
        return self._values[node]

    def _has(self, node: Node) -> bool:
        return node in self._values or (self._base is not None and node not in self._dependent)

    def _get(self, node: Node) -> Any:
        return self._values[node] if node in self._values else self.value(node)

    def _needed(self, node: Node) -> Iterable[Node]:
        if _is_size(node) or node.op in ("placeholder", "get_attr"):
            return []
        skipped = _shape_only_argument(node)
        return [needed for needed in node.all_input_nodes if needed is not skipped]

    def _compute(self, node: Node) -> Any:
        if _is_size(node):
            return self._number(node.meta["val"])
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op != "call_function" or not _can_run(node.target):
            raise Unknown(f"it depends on the values of {node.name} ({node.target})")
        shape_only = _shape_only_argument(node)

        def concrete(argument: Any) -> Any:
            if isinstance(argument, Node):
                return self._empty(argument) if argument is shape_only else self._get(argument)
            if isinstance(argument, torch.device):
                return torch.device("cpu")
            return self._number(argument)

        arguments: list[Any] = list(map_aggregate(node.args, concrete))
        keywords: Any = map_aggregate(node.kwargs, concrete)
        for argument in node.all_input_nodes:
            check_written(argument, node)
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            arguments[0] = arguments[0].clone()
        try:
            return node.target(*arguments, **keywords)  # type: ignore[operator]
        except Exception as error:
            raise TooLong(f"{node.name} cannot be computed for {self.length} tokens: {error}") from error

    def _number(self, argument: Any) -> Any:
        if isinstance(argument, (int, float)) and not isinstance(argument, bool) and abs(argument) in self._integers:
            return type(argument)(math.copysign(self._integers[int(abs(argument))], argument))
        return self._sizes.number(argument, self.batch, self.length)

    def _empty(self, node: Node) -> torch.Tensor:
        return torch.empty(self._sizes.shape(node, self.batch, self.length), dtype=node.meta["val"].dtype)

    def _placeholder(self, node: Node) -> torch.Tensor:
        shape = self._sizes.shape(node, self.batch, self.length)
        if str(node.target) == "position_ids" and shape == (self.batch, self.length):
            return torch.arange(self.length).expand(shape)
        raise Unknown(f"it depends on the values of the input {node.target}")

    def _attribute(self, node: Node) -> Any:
        value = attribute(self._graph, node)
        if isinstance(value, torch.nn.Parameter):
            raise Unknown(f"it depends on the weight {node.target}")
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                raise Unknown(f"it depends on the buffer {node.target}, whose values are not loaded yet")
            if value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool:
                return torch.tensor(self._number(int(value)), dtype=value.dtype)
            return value.cpu()
        return value


def attribute(graph: GraphModule, node: Node) -> Any:
    """What a get_attr node reads."""
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def cone(node: Node, without: Node | None = None) -> set[Node]:
    """The nodes whose values `node` follows from, itself among them: shape-only arguments and sizes are not followed, nor is `without`."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in found or top is without:
            continue
        found.add(top)
        if not _is_size(top):
            skipped = _shape_only_argument(top)
            stack += [needed for needed in top.all_input_nodes if needed is not skipped]
    return found


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of the node's tensor, if it is one."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _shape_only_argument(node: Node) -> Node | None:
    at = 0 if node.target in SHAPE_OF_FIRST else 1 if node.target in SHAPE_OF_SECOND else None
    return node.args[at] if at is not None and isinstance(node.args[at], Node) else None  # type: ignore[return-value]


def writers(node: Node) -> list[Node]:
    """The nodes that write to the node's memory, itself or through views."""
    root = node
    while _shares_memory(root) and isinstance(root.args[0], Node):
        root = root.args[0]
    found, stack, seen = [], [root], {root}
    while stack:
        for user in stack.pop().users:
            if user in seen or not _shares_memory(user) or user.args[0] not in seen:
                continue
            seen.add(user)
            stack.append(user)
            if user.target._schema.is_mutable:  # type: ignore[union-attr]
                found.append(user)
    return found


def check_written(node: Node, reader: Node) -> None:
    """Raises `Unknown` if the node's memory is written to before `reader` reads it: here a node has one value."""
    for writer in writers(node):
        if node < writer < reader:
            raise Unknown(f"{node.name} is changed in place by {writer.name}")


def _shares_memory(node: Node) -> bool:
    """Whether the node's result is a view of its first argument, or that argument after it was written to."""
    if not isinstance(node.target, OpOverload) or not node.args:
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _can_run(target: Any) -> bool:
    if isinstance(target, OpOverload):
        return target.namespace in ("aten", "prims")
    return getattr(target, "__module__", "") in ("_operator", "math") or str(getattr(target, "__name__", "")).startswith("sym_")
