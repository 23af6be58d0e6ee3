"""What an additive mask means: causal, a window or a chunk, ALiBi slopes - found by evaluating it and comparing with templates.

The evidence must cover what could change with the length. So a mask is evaluated beyond every small constant that its subgraph compares or
computes with; one too large for that (a window of 4096) is replaced by small ones, and the mask must follow it. A square buffer
is read itself: the constant that it was made with counts as one of the subgraph's, and one that cannot be read is evaluated to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from ad_attention.match.evaluate import Evaluation, Sizes, TooLong, Unknown, attribute, dtype_of

aten = torch.ops.aten

LARGEST_INTEGER = 192
"""Integer constants up to this one are covered by evaluating at longer lengths, larger ones by replacing them."""
LARGEST_BUFFER = 8192
MASKED = -9e3
"""Scores this far below the best of their row have no weight; the -1e4 of old models is as good as minus infinity."""


@dataclass(frozen=True)
class MaskKind:
    """Causal, and closer than `window` or inside the same `chunk`; `slopes` [H] adds slope * (j - i)."""

    window: int | None = None
    chunk: int | None = None
    slopes: torch.Tensor | None = None

    def allowed(self, length: int) -> torch.Tensor:
        """[S, S] bool: may query i (row) see key j (column)."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = j <= i
        if self.window is not None:
            seen = seen & (j > i - self.window)
        if self.chunk is not None:
            seen = seen & (j // self.chunk == i // self.chunk)
        return seen


Additive = Callable[[Evaluation], torch.Tensor]
"""[B or 1, H or 1, S, S]: what is added to the scores; MASKED or less below a row's best where a key is not seen."""


class Classifier:
    """Classifies the masks of one graph. Evaluations are shared between the masks of its layers."""

    def __init__(self, graph: GraphModule):
        self.graph, self.sizes = graph, Sizes(graph)
        self._evaluations: dict[tuple[int, int], Evaluation] = {}

    def evaluation(self, batch: int, length: int, integers: Mapping[int, int] | None = None) -> Evaluation:
        """The shared evaluation at these sizes; a fresh one if integers are replaced."""
        if integers:
            return Evaluation(self.graph, self.sizes, batch, length, integers=integers)
        if (batch, length) not in self._evaluations:
            self._evaluations[batch, length] = Evaluation(self.graph, self.sizes, batch, length)
        return self._evaluations[batch, length]

    def classify(self, additive: Additive, nodes: Iterable[Node]) -> MaskKind:
        """The kind of the mask that `nodes` compute. Raises `Unknown` with the reason if it is none that we know."""
        if not self.sizes.dynamic:
            raise Unknown("the graph was exported for one length, so what its mask does at another cannot be seen")
        nodes = list(nodes)
        eps = max(
            [
                torch.finfo(torch.float32).eps,
                *(torch.finfo(dtype).eps for dtype in map(dtype_of, nodes) if dtype is not None and dtype.is_floating_point),
            ]
        )
        integers, buffers = integers_of(nodes, self.graph), _buffers(nodes, self.graph)
        small = [integer for integer in integers if integer <= LARGEST_INTEGER]
        lengths = {7, 40, 2 * max(small, default=1) + 3, *(2 * bound + 3 for bound in buffers.values())}
        if buffers:  # the model goes no farther than its buffers do
            lengths = {min(length, *buffers) for length in lengths}
        longest, matrix = self._longest(additive, lengths | {integer for integer in small if 7 < integer < max(lengths)})
        kind = read_mask(matrix, eps)
        for length in sorted(length for length in lengths if length < longest):
            _check(_matrix(additive, self.evaluation(2 if length <= 40 else 1, length)), kind, eps)
        for integer in integers:
            if integer > LARGEST_INTEGER:
                kind = self._follow(additive, integer, kind, min(longest, 48), eps)
        return kind

    def _longest(self, additive: Additive, lengths: Iterable[int]) -> tuple[int, torch.Tensor]:
        """The longest of the lengths at which the model runs at all, and the mask there."""
        *shorter, longest = sorted(lengths)
        while True:
            try:
                return longest, _matrix(additive, self.evaluation(2 if longest <= 40 else 1, longest))
            except TooLong:
                if not shorter:
                    raise
                longest = shorter.pop()

    def _follow(self, additive: Additive, integer: int, kind: MaskKind, length: int, eps: float) -> MaskKind:
        """What a large integer of the mask means: it is replaced by small ones, and the mask must change with it, or not at all."""
        seen: list[tuple[int, MaskKind]] = []
        for small in (11, 17):
            try:
                matrix = _matrix(additive, self.evaluation(1, length, {integer: small}))
            except Unknown:
                return kind  # it is a size that other sizes must fit, not a bound that positions are compared with
            seen.append((small, read_mask(matrix, eps)))
        if all((found.window, found.chunk) == (kind.window, kind.chunk) for _, found in seen):
            return kind
        offsets = {found.window - small for small, found in seen if found.window is not None and found.chunk is None}
        if len(offsets) == 1 and all(found.window is not None for _, found in seen) and kind.window is None:
            return MaskKind(integer + offsets.pop(), kind.chunk, kind.slopes)
        if all(found.chunk == small for small, found in seen) and kind.chunk is None:
            return MaskKind(kind.window, integer, kind.slopes)
        raise Unknown(f"its mask depends on the constant {integer} in a way that is neither a window nor a chunk")


FILLED = {
    aten.masked_fill.Scalar: 2,
    aten.masked_fill_.Scalar: 2,
    aten.where.ScalarOther: 2,
    aten.where.ScalarSelf: 1,
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.fill_.Scalar: 1,
    aten.fill.Scalar: 1,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
}
"""Where ops take a number that becomes a score: it bounds no position."""

COMPARED = frozenset(getattr(aten, name).Scalar for name in ("lt", "le", "gt", "ge", "eq", "ne"))


def integers_of(nodes: Iterable[Node], graph: GraphModule) -> list[int]:
    """The constants that the nodes compute positions with, without their signs."""
    found: set[int] = set()

    def visit(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and 1 < abs(value) < 2**31 - 1:
            found.add(abs(value))
        return value

    for node in nodes:
        if node.op == "call_function":
            filled = FILLED.get(node.target)  # type: ignore[call-overload]
            map_aggregate(([argument for at, argument in enumerate(node.args) if at != filled], node.kwargs), visit)
            if node.target in COMPARED and isinstance(node.args[1], float) and node.args[1].is_integer():
                visit(int(node.args[1]))
        elif node.op == "get_attr":
            value = attribute(graph, node)
            if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point() and not value.is_meta:
                visit(int(value))
    return sorted(found)


def _buffers(nodes: Iterable[Node], graph: GraphModule) -> dict[int, int]:
    """Sizes of the square buffers among the nodes, with the window or chunk that they hold: 1 for plain causal ones, their size for
    those that cannot be read."""
    found: dict[int, int] = {}
    for node in nodes:
        value = attribute(graph, node) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or value.is_meta:
            continue
        if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] == 1:
            continue
        size = value.shape[-1]
        if size > LARGEST_BUFFER:
            raise Unknown(f"its mask is a buffer of {size} positions, more than are looked at ({LARGEST_BUFFER})")
        found[size] = max(found.get(size, 1), _bound(value.cpu()))
    return found


def _bound(buffer: torch.Tensor) -> int:
    matrix = buffer.reshape(-1, *buffer.shape[-2:])
    for seen in (matrix != 0, matrix == 0, matrix > MASKED):
        try:
            kind = read_mask(torch.zeros(seen.shape).masked_fill(~seen, float("-inf")), 0.0)
        except Unknown:
            continue
        return kind.window or kind.chunk or 1
    return matrix.shape[-1]


def _matrix(additive: Additive, evaluation: Evaluation) -> torch.Tensor:
    """[H or 1, S, S] of the mask, which must be the same for every sequence."""
    matrix = additive(evaluation)
    while matrix.dim() < 4:
        matrix = matrix[None]
    length = evaluation.length
    if matrix.dim() != 4 or matrix.shape[-2] not in (1, length) or matrix.shape[-1] != length:
        raise Unknown(f"its mask has the shape {tuple(matrix.shape)} for {length} tokens")
    matrix = matrix.expand(-1, -1, length, length)
    if (matrix != matrix[:1]).any():
        raise Unknown("its mask differs between the sequences of a batch")
    if matrix.isnan().any():
        raise Unknown("its mask has values that are not numbers")
    return matrix[0]


def read_mask(matrix: torch.Tensor, eps: float) -> MaskKind:
    """The kind of one evaluated mask [H, S, S], its values rounded to `eps`. Raises `Unknown` if it is none that we know."""
    seen = _seen(matrix)
    length = seen.shape[-1]
    lowest = seen.to(torch.int8).argmax(-1)  # the first key that each query sees
    steps = torch.arange(length)
    after = lowest.nonzero()
    kind = MaskKind()
    if len(after):
        first = int(after[0])  # the first query that does not see key 0
        kinds = [MaskKind(window=first), MaskKind(chunk=first)]
        known = [kind for kind in kinds if torch.equal(kind.allowed(length), seen)]
        if not known:
            raise Unknown(f"its mask is causal but neither a window nor a chunk (query {first} starts at key {int(lowest[first])})")
        kind = known[0]
    elif not torch.equal(kind.allowed(length), seen):
        raise Unknown("its mask hides keys that neither causality, a window nor a chunk hides")
    relative = matrix - matrix.diagonal(dim1=-2, dim2=-1)[..., None]
    relative = torch.where(seen, relative, 0.0).float()
    if not relative.any():
        return kind
    distance = 1  # a power of two: a product of it and a slope is exact in any dtype
    while distance * 2 < length and bool(seen[distance * 2, 0]):
        distance *= 2
    slopes = -relative[:, distance, 0] / distance
    _check_slopes(relative, slopes, seen, steps, matrix, eps)
    return MaskKind(kind.window, kind.chunk, slopes)


def _check(matrix: torch.Tensor, kind: MaskKind, eps: float) -> None:
    """Raises `Unknown` unless the mask at this length is of the kind that another length showed."""
    seen = _seen(matrix)
    length = seen.shape[-1]
    if not torch.equal(kind.allowed(length), seen):
        raise Unknown(f"its mask at {length} tokens is another than at more")
    relative = torch.where(seen, matrix - matrix.diagonal(dim1=-2, dim2=-1)[..., None], 0.0).float()
    slopes = kind.slopes if kind.slopes is not None else torch.zeros(matrix.shape[0])
    _check_slopes(relative, slopes, seen, torch.arange(length), matrix, eps)


def _seen(matrix: torch.Tensor) -> torch.Tensor:
    """[S, S] bool of [H, S, S]. Raises `Unknown` if heads differ or a query sees keys after it."""
    seen = matrix > matrix.amax(-1, keepdim=True) + MASKED
    if (seen != seen[:1]).any():
        raise Unknown("its mask differs between heads")
    length = matrix.shape[-1]
    if (seen[0] & ~MaskKind().allowed(length)).any():
        raise Unknown("it is not causal: a query sees keys after it")
    if not seen[0].diagonal().all():
        raise Unknown("a query does not see its own key")
    return seen[0]


def _check_slopes(
    relative: torch.Tensor, slopes: torch.Tensor, seen: torch.Tensor, steps: torch.Tensor, matrix: torch.Tensor, eps: float
) -> None:
    expected = slopes[:, None, None] * (steps[None, :] - steps[:, None])
    # the rounding of what was added, in the coarsest dtype that it went through
    largest = torch.where(seen, matrix, 0.0).abs().max()
    if (torch.where(seen, relative - expected, 0.0).abs() > 4 * eps * largest + 1e-30).any():
        raise Unknown("its position bias is not a slope times the distance")
