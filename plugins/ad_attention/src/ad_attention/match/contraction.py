"""Products of two tensors, however they are spelled, with the meaning of every dimension: query by key, weights by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ad_attention.match.axes import BATCH, BATCH_AXIS, FEATURE, HEADS, LENGTH, SEQUENCE, Atom, Group, Layout
from ad_attention.match.evaluate import Sizes, Unknown

aten = torch.ops.aten

PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default})


@dataclass(frozen=True)
class Product:
    """out[names of out] = sum over the names that out lacks."""

    node: Node
    left: Node
    right: Node
    left_names: str
    right_names: str
    out_names: str
    alpha: float = 1.0

    def names_of(self, operand: Node) -> str:
        return self.left_names if operand is self.left else self.right_names


def read_product(node: Node) -> Product | None:
    """The node as a product of two tensors, or None."""
    if node.target not in PRODUCTS:
        return None
    if node.target is aten.einsum.default:
        equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
        if "." in equation or "->" not in equation or len(operands) != 2:
            return None
        inputs, _, out = equation.partition("->")
        left_names, right_names = inputs.split(",")
        return Product(node, operands[0], operands[1], left_names, right_names, out)
    at = 1 if node.target is aten.baddbmm.default else 0
    left, right = node.args[at : at + 2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    ranks = [operand.meta["val"].dim() for operand in (left, right)]
    if min(ranks) < 2:
        return None
    leading = "uvwxyz"[-(max(ranks) - 2) :] if max(ranks) > 2 else ""
    names = [leading[len(leading) - (rank - 2) :] for rank in ranks]
    alpha = node.kwargs.get("alpha", 1.0)
    return Product(node, left, right, names[0] + "ic", names[1] + "cj", leading + "ij", float(alpha))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScoresProduct:
    """query by key: `groups` says what the dimensions of the scores hold, the last two being query and key positions."""

    product: Product
    query: Layout
    key: Layout
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class OutputProduct:
    """weights by value."""

    product: Product
    value: Layout
    weights: tuple[Group, ...]
    output: Layout


def read_scores(node: Node, sizes: Sizes) -> ScoresProduct | None:
    """The product as query by key over one sequence, or None if its result is no [..., S, S]."""
    product = read_product(node)
    if product is None or _shape(node, sizes)[-2:] != (LENGTH, LENGTH):
        return None
    row, column = product.out_names[-2], product.out_names[-1]
    sides = [(product.left, product.left_names), (product.right, product.right_names)]
    if row in product.right_names:
        sides.reverse()
    (query, query_names), (key, key_names) = sides
    contracted = set(query_names) & set(key_names) - set(product.out_names)
    if len(contracted) != 1 or row in key_names or column in query_names:
        return None
    names = _Names(product.out_names, {row: SEQUENCE, column: SEQUENCE, contracted.pop(): FEATURE}, sizes)
    groups = names.layout(node, product.out_names).groups
    scores = ScoresProduct(product, names.layout(query, query_names), names.layout(key, key_names), groups)
    heads = {atom for group in groups for atom in group if atom.kind == HEADS}
    shared = heads - set(scores.key.heads)
    if heads != set(scores.query.heads) or (shared and any(atom.order > min(other.order for other in shared) for atom in scores.key.heads)):
        raise Unknown(f"the heads of {query.name} and {key.name} do not share keys in groups")
    return scores


def read_output(node: Node, weights: Node, sizes: Sizes) -> OutputProduct | None:
    """The product as weights by value, contracted over the key positions, or None."""
    product = read_product(node)
    if product is None or weights not in (product.left, product.right) or product.left is product.right:
        return None
    value = product.right if weights is product.left else product.left
    weight_names, value_names = product.names_of(weights), product.names_of(value)
    contracted = set(weight_names) & set(value_names) - set(product.out_names)
    features = [name for name in product.out_names if name not in weight_names]
    rows = [name for name in product.out_names if name not in value_names and name in weight_names]
    if len(contracted) != 1 or len(features) != 1 or len(rows) != 1 or weight_names[-2:] != rows[0] + min(contracted):
        return None
    names = _Names(product.out_names, {contracted.pop(): SEQUENCE, rows[0]: SEQUENCE, features[0]: FEATURE}, sizes)
    return OutputProduct(
        product, names.layout(value, value_names), names.layout(weights, weight_names).groups, names.layout(node, product.out_names)
    )


def layout_of(node: Node, kinds: Sequence[str], sizes: Sizes) -> Layout:
    """A layout from the kind of each dimension; SEQUENCE and FEATURE are meant as said, the others follow from their size."""
    letters = "abcdefgh"[: len(kinds)]
    meaning = {letter: kind for letter, kind in zip(letters, kinds, strict=True) if kind in (SEQUENCE, FEATURE)}
    return _Names(letters, meaning, sizes).layout(node, letters)


@dataclass(frozen=True)
class _Names:
    """What the names of a product's dimensions mean: `meaning` knows sequences and features, others are batch, heads, or both in one."""

    out: str
    meaning: Mapping[str, str]
    sizes: Sizes

    def layout(self, node: Node, names: str) -> Layout:
        return Layout(node, tuple(self._group(node, name, size) for name, size in zip(names, _shape(node, self.sizes), strict=True)))

    def _group(self, node: Node, name: str, size: int) -> Group:
        kind = self.meaning.get(name)
        if size == 1:
            return ()
        if kind is not None:
            if (size == LENGTH) != (kind == SEQUENCE):
                raise Unknown(f"{node.name} has {size if size != LENGTH else 'the sequence'} where its product needs the {kind}")
            return (Atom(kind, size),)
        if size % LENGTH == 0:
            raise Unknown(f"{node.name} has a sequence beside those of queries and keys")
        order = (self.out.index(name),)
        if size % BATCH:
            return (Atom(HEADS, size, order),)
        batch = Atom(BATCH_AXIS, BATCH)
        return (batch,) if size == BATCH else (batch, Atom(HEADS, size // BATCH, order))


def _shape(node: Node, sizes: Sizes) -> tuple[int, ...]:
    return sizes.shape(node, BATCH, LENGTH)
