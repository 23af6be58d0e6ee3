"""Trying out what the table cannot prove: run a few nodes on random numbers, change some tokens, see which tokens change.

A region is a set of nodes with one exit. Floating values that enter it are made up; whole numbers and masks that enter it
(indices, lengths) are computed as the graph computes them, from made-up floats further up, so that they stay consistent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.graph.axes import Axis, Sizes, UnknownSize
from ad_core.graph.edit import is_op, tensor_at
from ad_core.graph.reactions import Reaction, Verdict

PROBE_BYTES = 4 << 30
"""What a region may take: one with larger operands is not tried."""

_BLOCK = 1 << 20
_FEW = 64
_COMPARISONS = tuple(f"aten::{name}" for name in "eq ne lt le gt ge isin".split())
_UNINITIALISED = (
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::empty_permuted",
)


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
        """The value of a node that reads no tokens, with everything it needs made up or computed: what is made up is the same for
        every token. Raises what its ops raise."""
        cone, entries = self._supply([node])
        sizes = sizes or self._sizes
        made = {entry: self._make_up(entry, sizes) for entry in entries}
        for entry, value in made.items():
            for dim in self._sizes.length_dims(entry.meta.get("val")):
                made[entry] = value = value.narrow(dim, 0, 1).expand_as(value).clone()
        return _execute(cone, made, sizes)[node]

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

    def _telling_ids(self, cone: Sequence[Node], entries: Sequence[Node]) -> torch.Tensor:
        """Token ids among which every comparison with a constant in the cone turns out both ways: a padding token, say. Each stands
        before one that differs. Without comparisons just a few ids."""
        limit = min((self._sizes.number(node.meta["val"].shape[0]) for node in entries if _is_table(node)), default=1 << 31)
        constants: set[int] = set()
        for node in cone:
            if is_op(node, *_COMPARISONS):
                constants |= {value for value in node.args if isinstance(value, int)}
                constants.update(*(self._constants(parent) for parent in node.all_input_nodes))
        wanted = sorted(value for value in constants if 0 < value < limit - 1)
        return torch.tensor([id for value in wanted for id in (value, value + 1 if value + 1 not in wanted else 0)] or range(4))

    def _constants(self, node: Node) -> list[int]:
        """The whole numbers that the node reads, if it reads a few."""
        real = tensor_at(self._graph, str(node.target)) if node.op == "get_attr" else None
        few = real is not None and not real.is_meta and not real.is_floating_point() and not real.is_complex() and real.numel() <= _FEW
        return real.flatten().tolist() if few and real is not None else []

    def _make_up(self, node: Node, sizes: Sizes, ids: torch.Tensor | None = None) -> Any:
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
            ids = torch.arange(4) if ids is None else ids
            return ids[torch.randint(0, len(ids), shape, generator=generator(node.name))].to(value.dtype)
        return random_tensor(shape, value.dtype, node.name)

    # -- the trial ------------------------------------------------------------------------------------------------------

    def _run(
        self, cone: Sequence[Node], entries: Sequence[Node], exits: Sequence[Node], axes: Callable[[Node], frozenset[Axis]]
    ) -> list[Verdict]:
        sizes = self._sizes
        needed = sum(_bytes(entry.meta["val"], sizes) for entry in entries)
        if needed > PROBE_BYTES:
            return [Verdict(mixes=f"its operands take {needed / 2**30:.1f} GiB, too much to try it")] * len(exits)
        ids = self._telling_ids(cone, entries)
        watched: list[Reaction] = []
        for positive in (False, True):  # where some ops give no numbers, or do not react, others may
            values = {entry: self._make_up(entry, sizes, ids) for entry in entries}
            if positive:
                values = {entry: _positive(value) for entry, value in values.items()}
            base = _execute(cone, values, sizes, keep=exits)
            again = [Reaction(base[node], sizes.length, min(self._by_shape(node), default=None)) for node in exits]
            for tokens in _separating(sizes.length):
                other = dict(values)
                for entry in entries:
                    for axis in axes(entry):
                        other[entry] = _change_tokens(other[entry], axis, tokens, ids if entry.target == "input_ids" else None)
                results = _execute(cone, other, sizes, keep=exits)
                for node, reaction in zip(exits, again, strict=True):
                    reaction.see(results[node], tokens)
                if all(reaction.settled for reaction in again):
                    break
            watched = [new if old.silent else old for old, new in zip(watched, again, strict=True)] if watched else again
            if not any(reaction.silent for reaction in watched):
                break
        return [reaction.verdict for reaction in watched]

    def _by_shape(self, node: Node) -> frozenset[Axis]:
        value = node.meta["val"]
        return self._sizes.axes_by_shape(value[0] if isinstance(value, list | tuple) else value)

    # -- remembering ----------------------------------------------------------------------------------------------------

    def _signature(
        self, cone: Sequence[Node], entries: Sequence[Node], exits: Sequence[Node], axes: Callable[[Node], frozenset[Axis]]
    ) -> bytes:
        number = {node: index for index, node in enumerate([*entries, *cone])}
        digest = hashlib.sha256()
        for entry in entries:
            kind = entry.op if entry.op == "placeholder" else "value"
            digest.update(repr((kind, _described(entry.meta["val"]), sorted(axes(entry)))).encode())
            digest.update(repr(self._constants(entry)).encode())
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


def generator(name: str) -> torch.Generator:
    """Random numbers that depend on a name alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little"))


def random_tensor(shape: Sequence[int], dtype: torch.dtype, name: str) -> torch.Tensor:
    """Standard normal numbers that depend on the name and the shape alone; a large tensor repeats one block of them."""
    count = int(torch.Size(shape).numel())
    real = torch.float32 if not dtype.is_complex else dtype
    if count <= _BLOCK:
        return torch.randn(*shape, generator=generator(name), dtype=real).to(dtype)
    block = torch.randn(_BLOCK - 3, generator=generator(name), dtype=real).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(*shape)


def _positive(value: Any) -> Any:
    return value.abs() + 0.1 if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _separating(length: int) -> Iterator[torch.Tensor]:
    """Sets of tokens ([S] bool) such that for any two tokens some set has the first and not the second: by the bits of their numbers."""
    token = torch.arange(length)
    for bit in range((length - 1).bit_length()):
        chosen = (token >> bit) % 2 == 1
        yield chosen
        yield ~chosen


def _is_table(node: Node) -> bool:
    """Whether the made-up value is a table that token ids are looked up in."""
    return any(is_op(user, "aten::embedding") and user.args[0] is node for user in node.users)


def _change_tokens(value: torch.Tensor, axis: Axis, tokens: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """A copy in which everything of some tokens is another: about as large as before, and far from it; of `ids` the next."""
    changed = value.clone()
    place = tokens[(torch.arange(value.shape[axis.dim]) // axis.inner) % len(tokens)]
    rows = changed.movedim(axis.dim, 0)
    old = rows[place]
    if value.is_floating_point() or value.is_complex():
        rows[place] = old.flip(-1).neg() + 2 if old.dim() > 1 else 2 - old
    elif value.dtype == torch.bool:
        rows[place] = ~old
    elif ids is not None:
        place_of = (old[..., None] == ids).int().argmax(-1)
        rows[place] = ids[(place_of + 1) % len(ids)].to(value.dtype)
    else:
        rows[place] = (old + 1) % 4 if int(value.max()) < 4 else old + 1
    return changed


def _bytes(value: Any, sizes: Sizes) -> int:
    return int(torch.Size(sizes.shape(value)).numel()) * value.dtype.itemsize if isinstance(value, torch.Tensor) else 0


def _described(value: Any) -> Any:
    return (tuple(str(size) for size in value.shape), value.dtype) if isinstance(value, torch.Tensor) else str(value)
