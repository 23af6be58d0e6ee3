"""Where the tokens of a sequence lie in a tensor, and the numbers that stand in for symbolic sizes while we look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import GraphModule, Node

from ad_core.api.errors import GraphInvalidError

LENGTHS = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
"""Primes: one that divides no other size of the graph makes the token axis recognisable."""

TOKEN_INPUTS = ("input_ids", "position_ids", "inputs_embeds")
"""The inputs of a canonical graph: [B, S] or [B, S, D]."""


@dataclass(frozen=True, order=True)
class Axis:
    """The tokens lie along `dim`: index i belongs to token (i // inner) % S, and the dim's size is outer * S * inner.

    A flattened [B * S] has inner 1, a flattened [S, K] has inner K, a repeated [S] has outer 2.
    """

    dim: int
    outer: int = 1
    inner: int = 1


class UnknownSize(Exception):
    """A size that depends on data (an unbacked symbol): no number stands in for it."""


class Sizes:
    """Numbers for the symbols of one graph: the batch is 1, as in the engine's packed batch, and the length a prime.

    Raises `GraphInvalidError` if the graph has no token input, or its length is not symbolic.
    """

    def __init__(self, graph: GraphModule):
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder" and node.target in TOKEN_INPUTS]
        if not inputs:
            raise GraphInvalidError("the graph has no token input", why=f"none of its placeholders is one of {', '.join(TOKEN_INPUTS)}")
        shapes = [node.meta["val"].shape for node in inputs]
        lengths = {symbol for shape in shapes for symbol in _symbols(shape[1])}
        if not lengths:
            raise GraphInvalidError(
                f"the length of {inputs[0].target} is fixed to {shapes[0][1]}",
                why="tokens are followed through a graph by the symbol of their number",
                hint="export with a dynamic sequence dimension",
            )
        batches = {symbol for shape in shapes for symbol in _symbols(shape[0])} - lengths
        self._symbols = frozenset(lengths)
        self.symbols = frozenset(lengths | batches)
        """The symbols of length and batch."""
        self.length = _distinct_length(graph)
        self._values: dict[sympy.Basic, sympy.Basic] = dict.fromkeys(batches, sympy.Integer(1)) | self._at(self.length)
        self._known: dict[sympy.Basic, int | float | bool] = {}

    def number(self, size: Any) -> Any:
        """The number that stands in for an int, float or bool, symbolic or not. Raises `UnknownSize`."""
        if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
            return size
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = self._evaluate(expression, self._values)
        return self._known[expression]

    def shape(self, value: torch.Tensor) -> tuple[int, ...]:
        """The tensor's shape in numbers."""
        return tuple(self.number(size) for size in value.shape)

    def carries_length(self, size: Any) -> bool:
        """Whether the size (or symbolic number) depends on the number of tokens."""
        return bool(_symbols(size) & self._symbols)

    def carries_batch(self, size: Any) -> bool:
        """Whether the size (or symbolic number) depends on the number of rows."""
        return bool(_symbols(size) & (self.symbols - self._symbols))

    def length_dims(self, value: Any) -> tuple[int, ...]:
        """The dims of a tensor whose size depends on the number of tokens."""
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(dim for dim, size in enumerate(value.shape) if self.carries_length(size))

    def axes_by_shape(self, value: Any) -> frozenset[Axis]:
        """Every dim that holds the tokens as far as the shape alone tells: its size is a multiple of the length."""
        return frozenset(
            Axis(dim, 1, self.number(value.shape[dim]) // self.length)
            for dim in self.length_dims(value)
            if self.number(value.shape[dim]) % self.length == 0
        )

    def other_length(self) -> Sizes:
        """The same graph at another length."""
        other: Sizes = object.__new__(Sizes)
        other._symbols, other.symbols = self._symbols, self.symbols
        other.length = next(length for length in LENGTHS if length != self.length)
        other._values = self._values | other._at(other.length)
        other._known = {}
        return other

    def _at(self, length: int) -> dict[sympy.Basic, sympy.Basic]:
        return dict.fromkeys(self._symbols, sympy.Integer(length))

    @staticmethod
    def _evaluate(expression: sympy.Basic, values: dict[sympy.Basic, sympy.Basic]) -> int | float | bool:
        result = expression.xreplace(values)
        if result.free_symbols:
            raise UnknownSize(str(expression))
        if result in (sympy.true, sympy.false):
            return bool(result)
        return int(result) if result.is_integer else float(result)


def reshaped(axis: Axis, before: Sequence[int], after: Sequence[int], length: int) -> Axis | None:
    """The axis after the elements were laid out in another shape in the same order, or None if no dim holds whole tokens."""
    lead = prod(before[: axis.dim]) * axis.outer
    trail = axis.inner * prod(before[axis.dim + 1 :])
    for dim, size in enumerate(after):
        ahead, behind = prod(after[:dim]), prod(after[dim + 1 :])
        if ahead and behind and lead % ahead == 0 and trail % behind == 0 and size == lead // ahead * length * (trail // behind):
            return Axis(dim, lead // ahead, trail // behind)
    return None


def _symbols(size: Any) -> set[sympy.Basic]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else set()


def _distinct_length(graph: GraphModule) -> int:
    fixed = set()
    for node in graph.graph.nodes:
        fixed |= {size for value in _tensors(node) for size in value.shape if isinstance(size, int) and size > 1}
    return next((length for length in LENGTHS if all(size % length for size in fixed)), LENGTHS[-1])


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if isinstance(value, torch.Tensor)]
