"""What each dimension of a tensor holds - batch, heads, sequence, head features - followed through views.

A `Layout` is a node whose dimensions are named by atoms. `above` follows it to the tensor that a view was made of, `below` to the
view that is made of it. So the matchers find, from `[B, H, S, D]`, `[B*H, S, D]` or `[B, G, R, S, D]` at a product, the nearest tensor
that needs the fewest steps to become `[B, S, H, D]`, and the key and value heads before they were repeated.

Sizes are compared at a batch and a length that are large primes, so that equal products mean equal factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from ad_attention.match.evaluate import Sizes, Unknown

aten = torch.ops.aten

BATCH, LENGTH = 100003, 1000003
"""Primes larger than any size of a model."""

BATCH_AXIS, SEQUENCE, FEATURE, HEADS = "batch", "sequence", "feature", "heads"


@dataclass(frozen=True)
class Atom:
    """A dimension or a factor of one. Head atoms are ordered: `order` sorts them from the slowest to the fastest."""

    kind: str
    size: int
    order: tuple[int, ...] = ()


Group = tuple[Atom, ...]


@dataclass(frozen=True)
class Layout:
    """A node and the atoms of each of its dimensions; an empty group is a dimension of size 1."""

    node: Node
    groups: tuple[Group, ...]

    @property
    def heads(self) -> list[Atom]:
        """The head atoms in order, slowest first."""
        return sorted((atom for group in self.groups for atom in group if atom.kind == HEADS), key=lambda atom: atom.order)

    @property
    def num_heads(self) -> int:
        return prod(atom.size for atom in self.heads)

    def permutation(self) -> list[int] | None:
        """The order of the dimensions that are not of size 1 that gives [batch, sequence, heads..., feature]; None if a dimension
        holds more than one of these."""
        at: dict[str, list[tuple[tuple[int, ...], int]]] = {BATCH_AXIS: [], SEQUENCE: [], HEADS: [], FEATURE: []}
        for dim, group in enumerate(self.groups):
            if not group:
                continue
            if len({atom.kind for atom in group}) > 1 or (group[0].kind != HEADS and len(group) > 1):
                return None
            if group != tuple(sorted(group, key=lambda atom: atom.order)):
                return None
            at[group[0].kind].append((group[0].order, dim))
        if any(len(at[kind]) != 1 for kind in (BATCH_AXIS, SEQUENCE, FEATURE)):
            return None
        heads = sorted(at[HEADS])
        order = [dim for kind in (BATCH_AXIS, SEQUENCE) for _, dim in at[kind]] + [dim for _, dim in heads] + [at[FEATURE][0][1]]
        # heads that lie in several dimensions must not interleave
        flat = [atom for dim in order for atom in self.groups[dim] if atom.kind == HEADS]
        return order if flat == self.heads else None

    @property
    def cost(self) -> int:
        """Steps from here to [B, S, H, D]."""
        order = self.permutation()
        assert order is not None
        heads = len(order) - 3
        return (len(order) < len(self.groups)) + (order != sorted(order)) + (heads != 1)


def layouts_above(layout: Layout, sizes: Sizes, *, repeats: bool) -> Iterator[Layout]:
    """`layout` and the layouts that it is a view of, going up. With `repeats`, heads that were repeated are un-repeated."""
    step: Layout | None = layout
    while step is not None:
        yield step
        step = _above(step, sizes, repeats)


def layouts_below(layout: Layout, sizes: Sizes) -> Iterator[Layout]:
    """`layout` and the views made of it, going down as long as there is one user."""
    step: Layout | None = layout
    while step is not None:
        yield step
        users = list(step.node.users)
        step = _below(step, users[0], sizes) if len(users) == 1 else None


def best(layouts: Iterator[Layout]) -> Layout | None:
    """Of the layouts that can become [B, S, H, D]: the fewest heads, then the fewest steps, then the farthest."""
    found = [layout for layout in layouts if layout.permutation() is not None]
    return min(reversed(found), key=lambda layout: (layout.num_heads, layout.cost)) if found else None


_SAME = frozenset(
    {
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)
_CAST = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default})
_RESHAPE = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)


def _above(layout: Layout, sizes: Sizes, repeats: bool) -> Layout | None:
    node = layout.node
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    rank = len(layout.groups)
    if node.target in _SAME or (node.target in _CAST and _widens(source, node)):
        return Layout(source, layout.groups)
    order = _order(node, rank)
    if order is not None:
        groups: list[Group] = [()] * rank
        for out, into in enumerate(order):
            groups[into] = layout.groups[out]
        return Layout(source, tuple(groups))
    shape = _shape(source, sizes)
    if shape is None:
        return None
    if node.target in _RESHAPE:
        groups_or_none = _regroup([atom for group in layout.groups for atom in group], shape)
        return Layout(source, groups_or_none) if groups_or_none is not None else None
    if node.target is aten.expand.default:
        widened = _shape(node, sizes)
        if widened is None or len(widened) != len(shape):
            return None
        kept = tuple(() if shape[dim] != widened[dim] else group for dim, group in enumerate(layout.groups))
        dropped = [atom for dim, group in enumerate(layout.groups) if shape[dim] != widened[dim] for atom in group]
        return _unrepeated(source, kept, dropped, repeats)
    if node.target is aten.repeat_interleave.self_int and len(node.args) > 2 and isinstance(node.args[2], int):
        dim = node.args[2] % rank
        times = prod(atom.size for atom in layout.groups[dim]) // shape[dim]
        parts = _regroup(layout.groups[dim], (shape[dim], times))
        if parts is None:
            return None
        return _unrepeated(source, (*layout.groups[:dim], parts[0], *layout.groups[dim + 1 :]), parts[1], repeats)
    return None


def _below(layout: Layout, node: Node, sizes: Sizes) -> Layout | None:
    if node.op != "call_function" or not node.args or node.args[0] is not layout.node:
        return None
    if node.target in _SAME:
        return Layout(node, layout.groups)
    order = _order(node, len(layout.groups))
    if order is not None:
        return Layout(node, tuple(layout.groups[into] for into in order))
    if node.target in _RESHAPE:
        shape = _shape(node, sizes)
        groups = _regroup([atom for group in layout.groups for atom in group], shape) if shape is not None else None
        return Layout(node, groups) if groups is not None else None
    return None


def _order(node: Node, rank: int) -> list[int] | None:
    """For a permutation of dimensions: which input dimension each output dimension is."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]  # type: ignore[union-attr, operator, misc]
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    elif node.target is aten.mT.default or (node.target in (aten.t.default, aten.numpy_T.default) and rank == 2):
        first, second = rank - 2, rank - 1
    else:
        return None
    order[first], order[second] = order[second], order[first]
    return order


def _widens(source: Node, node: Node) -> bool:
    """Whether a cast keeps every value."""
    before: torch.dtype = source.meta["val"].dtype
    after: torch.dtype = node.meta["val"].dtype
    return before == after or (before.is_floating_point and torch.promote_types(before, after) == after)


def _unrepeated(source: Node, kept: tuple[Group, ...], dropped: Sequence[Atom], repeats: bool) -> Layout | None:
    """The layout without repeated head atoms. They must be the fastest, so that query head h reads key head h // times."""
    layout = Layout(source, kept)
    if not dropped:
        return layout
    slowest = min(atom.order for atom in dropped)
    repeated_heads = all(atom.kind == HEADS for atom in dropped) and all(atom.order < slowest for atom in layout.heads)
    return layout if repeats and repeated_heads else None


def _regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> tuple[Group, ...] | None:
    """The same atoms in the same order over dimensions of `shape`; head atoms are split where a dimension boundary falls inside."""
    rest, groups = list(atoms), []
    for size in shape:
        group: list[Atom] = []
        missing = size
        while missing > 1:
            if not rest:
                return None
            atom = rest.pop(0)
            if missing % atom.size == 0:
                group.append(atom)
                missing //= atom.size
                continue
            halves = _halves(atom, missing)
            if halves is None:
                return None
            group.append(halves[0])
            rest.insert(0, halves[1])
            missing = 1
        groups.append(tuple(group))
    return tuple(groups) if not rest else None


def _halves(atom: Atom, size: int) -> tuple[Atom, Atom] | None:
    if atom.kind != HEADS or atom.size % size:
        return None
    return Atom(HEADS, size, (*atom.order, 0)), Atom(HEADS, atom.size // size, (*atom.order, 1))


def _shape(node: Node, sizes: Sizes) -> tuple[int, ...] | None:
    try:
        return sizes.shape(node, BATCH, LENGTH)
    except Unknown:
        return None
