"""Trying out what the table cannot prove: run a few nodes on random numbers, change one token, see which tokens change.

A region is a set of nodes with one exit. Floating values that enter it are made up; whole numbers and masks that enter it
(indices, lengths) are computed as the graph computes them, from made-up floats further up, so that they stay consistent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.graph.axes import Axis, Sizes, UnknownSize
from ad_core.graph.edit import is_op, tensor_at

PROBE_BYTES = 4 << 30
"""What a region may take: one with larger operands is not tried."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_BLOCK = 1 << 20
_UNINITIALISED = (
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::empty_permuted",
)


@dataclass(frozen=True)
class Verdict:
    """What a trial found for one value: `axis` of its tokens (None: it does not depend on them), or why they mix."""

    axis: Axis | None = None
    mixes: str | None = None


class Probe:
    """Tries regions of one graph. A region that looks like an earlier one (ops, shapes, constants) is not run again."""

    def __init__(self, graph: GraphModule, sizes: Sizes):
        self._graph, self._sizes = graph, sizes
        self._seen: dict[bytes, list[Verdict]] = {}

    def try_region(self, region: Sequence[Node], exits: Sequence[Node], axes: Callable[[Node], frozenset[Axis]]) -> list[Verdict]:
        """What each of `exits` (nodes of `region`, which is in graph order) shows. `axes` tells where the tokens of an entry lie.

        A region that cannot be run here counts as mixing, with that reason.
        """
        cone, entries = self._supply(region)
        key = self._signature(cone, entries, exits, axes)
        if key not in self._seen:
            try:
                self._seen[key] = self._run(cone, entries, exits, axes)
            except UnknownSize as error:
                self._seen[key] = [Verdict(mixes=f"has a size that depends on data ({error}), so it could not be tried")] * len(exits)
            except Exception as error:  # any op of any package runs here: whatever it raises, nothing is proved
                reason = f"could not be tried: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                self._seen[key] = [Verdict(mixes=reason)] * len(exits)
        return self._seen[key]

    def evaluate(self, node: Node, sizes: Sizes | None = None) -> Any:
        """The value of a node, with everything it needs made up or computed. Raises what its ops raise."""
        cone, entries = self._supply([node])
        sizes = sizes or self._sizes
        return _execute(cone, {entry: self._make_up(entry, sizes) for entry in entries}, sizes)[node]

    # -- what a region needs --------------------------------------------------------------------------------------------

    def _supply(self, region: Sequence[Node]) -> tuple[list[Node], list[Node]]:
        """The region with the whole-number values above it, in graph order, and the values to make up."""
        inside = set(region)
        entries: dict[Node, None] = {}
        pending = list(region)
        while pending:
            for parent in pending.pop().all_input_nodes:
                if parent in inside or parent in entries:
                    continue
                if self._made_up(parent):
                    entries[parent] = None
                else:
                    inside.add(parent)
                    pending.append(parent)
        return [node for node in self._graph.graph.nodes if node in inside], list(entries)

    def _made_up(self, node: Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            return True
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return value.is_floating_point() or value.is_complex()
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            try:
                self._sizes.number(value)
            except UnknownSize:
                return False
            return True
        return False

    def _make_up(self, node: Node, sizes: Sizes) -> Any:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return sizes.number(value)
        shape = sizes.shape(value)
        if node.op == "get_attr" and not value.is_floating_point():
            real = tensor_at(self._graph, str(node.target))
            return torch.zeros(shape, dtype=value.dtype) if real is None or real.is_meta else real.detach().cpu()
        if node.op == "placeholder" and not value.is_floating_point():
            if node.target == "position_ids":
                return torch.arange(shape[1], dtype=value.dtype).expand(shape).clone()
            return torch.randint(0, 4, shape, generator=_generator(node.name), dtype=value.dtype)
        return _random(shape, value.dtype, node.name)

    # -- the trial ------------------------------------------------------------------------------------------------------

    def _run(
        self, cone: Sequence[Node], entries: Sequence[Node], exits: Sequence[Node], axes: Callable[[Node], frozenset[Axis]]
    ) -> list[Verdict]:
        sizes = self._sizes
        needed = sum(_bytes(entry.meta["val"], sizes) for entry in entries)
        if needed > PROBE_BYTES:
            return [Verdict(mixes=f"its operands take {needed / 2**30:.1f} GiB, too much to try it")] * len(exits)
        # Two tokens that no reversal or half-way shift maps to themselves or to each other.
        tokens = (sizes.length * 3 // 10, sizes.length * 6 // 10 + 1)
        verdicts: dict[int, Verdict] = {}
        numbers: set[int] = set()
        for positive in (False, True):  # where some ops give no numbers, or do not react, others may
            values = {entry: self._make_up(entry, sizes) for entry in entries}
            if positive:
                values = {entry: _positive(value) for entry, value in values.items()}
            base = _execute(cone, values, sizes, keep=exits)
            changed = []
            for token in tokens:
                other = dict(values)
                for entry in entries:
                    for axis in axes(entry):
                        other[entry] = _change_token(other[entry], axis, token, sizes.length)
                changed.append(_execute(cone, other, sizes, keep=exits))
            for index, node in enumerate(exits):
                if _has_numbers(base[node]):
                    numbers.add(index)
                if index not in verdicts:
                    verdict = self._compare(base[node], [run[node] for run in changed], tokens)
                    if verdict is not None:
                        verdicts[index] = verdict
        return [verdicts.get(index) or self._silent(node, index in numbers) for index, node in enumerate(exits)]

    def _compare(self, base: Any, changed: Sequence[Any], tokens: Sequence[int]) -> Verdict | None:
        """None: nothing changed. Of several results one that mixes decides, else the first that changed."""
        if isinstance(base, list | tuple):
            parts = [self._compare(part, [value[index] for value in changed], tokens) for index, part in enumerate(base)]
            known = [part for part in parts if part is not None]
            return next((part for part in known if part.mixes), known[0] if known else None)
        if not isinstance(base, torch.Tensor):
            return None if all(value == base for value in changed) else Verdict(mixes="reads a number out of the tokens")
        masks = [_differs(base, value) for value in changed]
        if any(mask is None for mask in masks):
            return Verdict(mixes="its shape depends on the tokens' values")
        if not any(bool(mask.any()) for mask in masks if mask is not None):
            return None
        for axis in _candidates(tuple(base.shape), self._sizes.length):
            if all(
                _only_token(mask, axis, token, self._sizes.length) for mask, token in zip(masks, tokens, strict=True) if mask is not None
            ):
                return Verdict(axis)
        return Verdict(mixes="changes at other tokens when one token changes")

    def _silent(self, node: Node, has_numbers: bool) -> Verdict:
        """For a value that never changed: it does not depend on the tokens, whatever dims it has."""
        if not has_numbers:
            return Verdict(mixes="gave no finite numbers, so nothing is proved")
        value = node.meta["val"]
        value = value[0] if isinstance(value, list | tuple) else value
        return Verdict(min(self._sizes.axes_by_shape(value), default=None))

    # -- remembering ----------------------------------------------------------------------------------------------------

    def _signature(
        self, cone: Sequence[Node], entries: Sequence[Node], exits: Sequence[Node], axes: Callable[[Node], frozenset[Axis]]
    ) -> bytes:
        number = {node: index for index, node in enumerate([*entries, *cone])}
        digest = hashlib.sha256()
        for entry in entries:
            kind = entry.op if entry.op == "placeholder" else "value"
            digest.update(repr((kind, _described(entry.meta["val"]), sorted(axes(entry)))).encode())
        for node in cone:
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda parent: f"%{number[parent]}")
            digest.update(repr((str(node.target), arguments)).encode())
        digest.update(repr([number[node] for node in exits]).encode())
        return digest.digest()


def _execute(cone: Iterable[Node], values: Mapping[Node, Any], sizes: Sizes, keep: Sequence[Node] | None = None) -> dict[Node, Any]:
    """Runs the nodes on the CPU. Values are kept for `keep` only, if given; made-up ones are not written to."""
    environment = dict(values)
    order = list(cone)
    last = {parent: node for node in order for parent in node.all_input_nodes}
    with torch.no_grad():
        for node in order:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda parent: environment[parent])
            args, kwargs = torch.fx.node.map_aggregate((args, kwargs), lambda value: _on_cpu(value, sizes))
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
                args = torch.fx.node.map_aggregate(args, lambda value: value.clone() if isinstance(value, torch.Tensor) else value)
            environment[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if is_op(node, *_UNINITIALISED):
                environment[node].zero_()
            if keep is not None:
                for parent in node.all_input_nodes:
                    if last[parent] is node and parent not in keep and parent not in values:
                        del environment[parent]
    return environment


def _on_cpu(value: Any, sizes: Sizes) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return sizes.number(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little"))


def _random(shape: Sequence[int], dtype: torch.dtype, name: str) -> torch.Tensor:
    """Standard normal numbers; a large tensor repeats one block of them."""
    count = int(torch.Size(shape).numel())
    real = torch.float32 if not dtype.is_complex else dtype
    if count <= _BLOCK:
        return torch.randn(*shape, generator=_generator(name), dtype=real).to(dtype)
    block = torch.randn(_BLOCK - 3, generator=_generator(name), dtype=real).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(*shape)


def _has_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_has_numbers(part) for part in value)
    return not isinstance(value, torch.Tensor) or bool(torch.isfinite(value).any())


def _positive(value: Any) -> Any:
    return value.abs() + 0.1 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _change_token(value: torch.Tensor, axis: Axis, token: int, length: int) -> torch.Tensor:
    """A copy in which everything of one token is another: about as large as before, and far from it."""
    changed = value.clone()
    place = (torch.arange(value.shape[axis.dim]) // axis.inner) % length == token
    rows = changed.movedim(axis.dim, 0)
    old = rows[place]
    if value.is_floating_point() or value.is_complex():
        rows[place] = old.flip(-1).neg() + 2 if old.dim() > 1 else 2 - old
    elif value.dtype == torch.bool:
        rows[place] = ~old
    else:
        rows[place] = (old + 1) % 4 if int(value.max()) < 4 else old + 1
    return changed


def _differs(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    """Where two results differ by more than rounding, or None if they cannot be compared."""
    if base.shape != other.shape:
        return None
    if not (base.is_floating_point() or base.is_complex()):
        return base != other
    tolerance = _TOLERANCE.get(base.dtype, 0.1 if base.dtype.itemsize < 2 else 1e-4)
    finite = base[torch.isfinite(base)]
    scale = float(finite.abs().float().mean()) if finite.numel() else 1.0
    close = torch.isclose(base, other, rtol=tolerance, atol=tolerance * max(scale, 1e-12), equal_nan=True)
    return ~close


def _candidates(shape: Sequence[int], length: int) -> list[Axis]:
    found = []
    for dim, size in enumerate(shape):
        if size % length == 0 and size > 0:
            rest = size // length
            found += [Axis(dim, outer, rest // outer) for outer in range(1, rest + 1) if rest % outer == 0]
    return found


def _only_token(differs: torch.Tensor, axis: Axis, token: int, length: int) -> bool:
    place = (torch.arange(differs.shape[axis.dim]) // axis.inner) % length == token
    return not bool(differs.movedim(axis.dim, 0)[~place].any())


def _bytes(value: Any, sizes: Sizes) -> int:
    return int(torch.Size(sizes.shape(value)).numel()) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _described(value: Any) -> Any:
    return (tuple(str(size) for size in value.shape), value.dtype) if isinstance(value, torch.Tensor) else str(value)
