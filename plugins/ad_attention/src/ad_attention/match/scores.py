"""The way of scores from the query-key product to the softmax, and of the weights from there to the value product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ad_attention.match.axes import BATCH, LENGTH
from ad_attention.match.contraction import PRODUCTS, OutputProduct, ScoresProduct, read_output, read_scores
from ad_attention.match.evaluate import Evaluation, Sizes, Unknown

aten = torch.ops.aten

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})

MULTIPLY = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar})
DIVIDE = frozenset({aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar})


@dataclass(frozen=True)
class Chain:
    """One attention: scores = query by key, `middle` (between the product and the softmax), softmax, `after`, weights by value.

    `sinks` is what was appended to the scores as a column: a vector [H], or of each query its own, [B, H, S, 1].
    """

    scores: ScoresProduct
    middle: tuple[Node, ...]
    softmax: Node
    after: tuple[Node, ...]
    output: OutputProduct
    sinks: Node | None

    @property
    def nodes(self) -> frozenset[Node]:
        return frozenset((self.scores.product.node, *self.middle, self.softmax, *self.after, self.output.product.node))

    @property
    def has_query_sinks(self) -> bool:
        return self.sinks is not None and self.sinks.meta["val"].dim() > 1

    @property
    def weights(self) -> Node:
        """What the value product reads."""
        return self.after[-1] if self.after else self.softmax


def is_over_sequence(node: Node, sizes: Sizes) -> bool:
    """Whether the node is a softmax over key positions: its last dimension is the sequence, or one more with a sink."""
    if node.target not in SOFTMAX or not isinstance(node.args[0], Node):
        return False
    shape = sizes.shape(node, BATCH, LENGTH)
    dim = node.args[1] % len(shape) if isinstance(node.args[1], int) else None
    return dim == len(shape) - 1 and shape[-1] in (LENGTH, LENGTH + 1)


def read_chain(softmax: Node, sizes: Sizes) -> Chain:
    """The attention around a softmax over the sequence. Raises `Unknown` with the reason if there is none that we know."""
    shape = sizes.shape(softmax, BATCH, LENGTH)
    if LENGTH not in shape[:-1]:
        raise Unknown("it weighs the whole sequence at once, for no query position")
    product = _scores_above(softmax, sizes)
    middle = _between(product.product.node, softmax)
    after, output = _value_below(softmax, sizes)
    sinks = _sinks(middle, product, sizes) if shape[-1] == LENGTH + 1 else None
    chain = Chain(product, middle, softmax, after, output, sinks)
    for node in chain.nodes - {output.product.node}:
        outside = [user.name for user in node.users if user not in chain.nodes]
        if outside:
            raise Unknown(f"{node.name} is also read by {', '.join(outside)}")
    return chain


def factors(chain: Chain, evaluation: Evaluation) -> tuple[float, float | None]:
    """(scale, softcap) of scores = softcap * tanh(query by key * scale / softcap), from the constants on the way. Raises `Unknown`."""
    before_tanh: float | None = None
    factor = {chain.scores.product.node: chain.scores.product.alpha}
    for node in chain.middle:
        source, *others = [argument for argument in node.all_input_nodes if argument in factor]
        if node.target in MULTIPLY | DIVIDE:
            if others or (node.target in DIVIDE and node.args[0] is not source):
                raise Unknown(f"{node.name} is a product of two things that depend on the scores")
            by = next(argument for argument in node.args if argument is not source)
            constant = _constant(by, evaluation) if isinstance(by, Node) else float(by)  # type: ignore[arg-type]
            factor[node] = factor[source] * constant if node.target in MULTIPLY else factor[source] / constant
        elif node.target in (aten.tanh.default, aten.tanh_.default):
            if before_tanh is not None:
                raise Unknown("its scores go through two tanh")
            before_tanh, factor[node] = factor[source], 1.0
        else:
            factor[node] = factor[source]
    last = factor[chain.middle[-1]] if chain.middle else factor[chain.scores.product.node]
    return (last, None) if before_tanh is None else (before_tanh * last, last)


def _constant(node: Node, evaluation: Evaluation) -> float:
    """The one value of a factor of the scores, where they are seen: on the diagonal, if it has one."""
    value = torch.as_tensor(evaluation.value(node))
    if value.dim() > 1 and value.shape[-1] == value.shape[-2]:
        value = value.diagonal(dim1=-2, dim2=-1)
    if value.numel() == 0 or (value != value.flatten()[0]).any():
        raise Unknown(f"the scores are multiplied by {node.name}, which is not one number")
    return float(value.flatten()[0])


def _scores_above(softmax: Node, sizes: Sizes) -> ScoresProduct:
    found: list[ScoresProduct] = []
    seen: set[Node] = set()
    stack = [softmax.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            scores = read_scores(node, sizes)
            if scores is not None:
                found.append(scores)
            if node.target is not aten.baddbmm.default:
                continue
            stack.append(node.args[0])
        elif _keeps_scores(node):
            stack += node.all_input_nodes
    if len(found) != 1:
        names = ", ".join(scores.product.node.name for scores in found) or "none"
        raise Unknown(f"one query-key product must lead to it, and there is {names}")
    return found[0]


def _keeps_scores(node: Node) -> bool:
    """Whether scores may pass through: anything of the ATen library that is no matrix product or other softmax. What it does to
    them is proven by numbers, not by its name."""
    if node.op != "call_function":
        return False
    heavy = (aten.linear.default, aten.embedding.default, aten.scaled_dot_product_attention.default, aten.layer_norm.default)
    return node.target not in SOFTMAX and node.target not in heavy


def _between(first: Node, last: Node) -> tuple[Node, ...]:
    """The nodes strictly between, in order."""
    above: set[Node] = set()
    stack = [last]
    while stack:
        for needed in stack.pop().all_input_nodes:
            if needed is not first and needed not in above:
                above.add(needed)
                stack.append(needed)
    below = {first}
    stack = [first]
    while stack:
        for user in stack.pop().users:
            if user in above and user not in below:
                below.add(user)
                stack.append(user)
    below.discard(first)
    ordered = []
    node = first
    while node is not last:
        node = node.next
        if node in below:
            ordered.append(node)
    return tuple(ordered)


def _value_below(softmax: Node, sizes: Sizes) -> tuple[tuple[Node, ...], OutputProduct]:
    after: list[Node] = []
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            names = ", ".join(user.name for user in users) or "nobody"
            raise Unknown(f"its weights ({node.name}) are read by {names} and not by one value product")
        user = users[0]
        if user.target in PRODUCTS:
            output = read_output(user, node, sizes)
            if output is None:
                raise Unknown(f"{user.name}, which reads its weights, is no product with values")
            return tuple(after), output
        if user.op != "call_function" or not isinstance(user.meta.get("val"), torch.Tensor) or user.all_input_nodes[0] is not node:
            raise Unknown(f"its weights go to {user.name} ({user.target}) and not to a value product")
        after.append(user)
        node = user


def _sinks(middle: tuple[Node, ...], scores: ScoresProduct, sizes: Sizes) -> Node:
    """The vector [H] whose column was appended to the scores, or a column that holds more."""
    columns = [node for node in middle if node.target is aten.cat.default]
    if len(columns) != 1 or len(columns[0].args[0]) != 2:  # type: ignore[arg-type]
        raise Unknown("its scores have a column more than there are keys, and no single concatenation made it")
    column = columns[0].args[0][1]  # type: ignore[index]
    heads = scores.query.num_heads
    node = column
    while isinstance(node, Node):
        shape = sizes.shape(node, BATCH, LENGTH)
        if shape == (heads,):
            return node
        if node.op != "call_function" or node.target not in _COLUMN:
            break
        node = node.args[0]
    if isinstance(column, Node) and sizes.shape(column, BATCH, LENGTH) == (BATCH, heads, LENGTH, 1):
        return column
    raise Unknown(f"the column {column} that is appended to its scores is not one value a head, nor one a head and query")


_COLUMN = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.repeat.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.type_as.default,
    }
)
