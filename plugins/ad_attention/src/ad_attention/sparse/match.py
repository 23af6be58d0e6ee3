"""Finds an indexer in a graph: the best of each row of causal index scores, proven by numbers."""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem

import torch
from torch.fx import GraphModule, Node

from ad_attention.match.axes import BATCH, LENGTH
from ad_attention.match.evaluate import Evaluation, Sizes, Unknown, cone
from ad_attention.match.mask_classifier import MASKED
from ad_attention.match.proposal import declined
from ad_attention.sparse.op import index_scores
from ad_core.api import Declined, Matcher, Proposal
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import is_op

aten = torch.ops.aten


class IndexerMatcher(Matcher):
    """topk over keys of sum over heads of weight * relu(query . key * scale), where later keys are masked."""

    name = "attention.indexer"
    produces = "ad_attention::select"

    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        sizes = Sizes(graph)
        for node in list(graph.graph.nodes):
            if not is_op(node, "aten::topk"):
                continue
            try:
                if sizes.shape(node.args[0], BATCH, LENGTH) == (BATCH, LENGTH, LENGTH):
                    yield _read(node, graph, sizes)
            except Unknown as why:
                yield declined(node, why)


def _read(topk: Node, graph: GraphModule, sizes: Sizes) -> Proposal:
    arguments = bound_arguments(topk)
    read = [user for user in topk.users if user.users]
    parts = {user.args[1]: user for user in read if user.target is getitem}
    if set(parts) != {1} or len(parts) != len(read) or arguments["dim"] not in (-1, 2) or not arguments["largest"]:
        raise Unknown("more is used of it than the indices of the highest scores")
    count = _count(arguments["k"], sizes)
    masked = arguments["self"]
    scores = next((each for each in masked.all_input_nodes if _is_product(each)), None)
    if scores is None or not is_op(masked, "aten::masked_fill", "aten::add", "aten::where"):
        raise Unknown("its scores are not a weighted sum over heads with a mask")
    product = _bare(scores)
    weight, positive = _bare(product.args[0], 3), _bare(product.args[1])
    if not is_op(positive, "aten::relu"):
        raise Unknown("its scores are not the positive part of products")
    dot = _bare(positive.args[0])
    scale = 1.0
    if is_op(dot, "aten::mul") and isinstance(dot.args[1], int | float):
        scale, dot = float(dot.args[1]), _bare(dot.args[0])
    if not is_op(dot, "aten::matmul"):
        raise Unknown("its scores are no product of queries and keys")
    query, turned = _bare(dot.args[0], 4), _bare(dot.args[1], 3)
    key = _bare(turned.args[0], 3) if is_op(turned, "aten::transpose") else turned
    shapes = [sizes.shape(each, BATCH, LENGTH) for each in (query, key, weight)]
    heads, width = shapes[0][2:] if len(shapes[0]) == 4 else (0, 0)
    if shapes != [(BATCH, LENGTH, heads, width), (BATCH, LENGTH, width), (BATCH, LENGTH, heads)]:
        raise Unknown(f"its query, key and weight have the shapes {shapes}")
    nodes = _between((query, key, weight), masked)
    for length in (3, 12):
        _prove(Evaluation(graph, sizes, 2, length), (query, key, weight), scores, masked, nodes, scale)
    output = parts[1]
    return Proposal(
        output=output,
        nodes=frozenset({topk, output, masked, scores, product, positive, dot}),
        arguments={"query": query, "key": key, "weight": weight, "count": count, "scale": scale},
    )


def _count(given: object, sizes: Sizes) -> int:
    value = given.meta["val"] if isinstance(given, Node) else given
    count = int(sizes.number(value, BATCH, LENGTH))
    if count >= LENGTH or any(int(sizes.number(value, 2, length)) != min(count, length) for length in (1, 7, 100)):
        raise Unknown(f"it takes {value} of the keys")
    return count


def _is_product(node: Node) -> bool:
    return is_op(_bare(node), "aten::matmul")


def _bare(node: object, rank: int | None = None) -> Node:
    """Above casts and dimensions of size 1, up to the first of `rank` dimensions if that is given."""
    if not isinstance(node, Node):
        raise Unknown(f"{node} is no tensor")
    same = ("aten::to", "aten::_to_copy", "aten::unsqueeze", "aten::squeeze", "aten::contiguous", "aten::detach", "aten::alias")
    while is_op(node, *same) and isinstance(node.args[0], Node):
        above = node.args[0]
        if rank is not None and node.meta["val"].dim() == rank != above.meta["val"].dim():
            break
        node = above
    return node


def _between(first: tuple[Node, ...], last: Node) -> frozenset[Node]:
    """What depends on `first` on the way to `last`."""
    found: set[Node] = set()
    stack = [last]
    above = cone(last)
    stack = list(first)
    while stack:
        for user in stack.pop().users:
            if user in above and user not in found:
                found.add(user)
                stack.append(user)
    return frozenset(found)


def _prove(evaluation: Evaluation, given: tuple[Node, ...], scores: Node, masked: Node, nodes: frozenset[Node], scale: float) -> None:
    """Random queries, keys and weights must get the scores of the canonical op, and later keys none. Raises `Unknown`."""
    random = torch.Generator().manual_seed(evaluation.length)
    values = {node: torch.randn(evaluation.shape(node), generator=random).to(node.meta["val"].dtype) for node in given}
    above = evaluation.over(values, nodes)
    query, key, weight = (values[node].float() for node in given)
    wanted = index_scores(query, key, weight, scale)
    found, seen = above.value(scores).float().reshape(wanted.shape), above.value(masked).float()
    later = torch.ones(evaluation.length, evaluation.length).triu(1).bool()
    tolerance = 40 * max(torch.finfo(node.meta["val"].dtype).eps for node in given) * float(wanted.abs().max().clamp_min(1))
    if not (found - wanted).abs().max() <= tolerance or not (seen - wanted).masked_fill(later, 0).abs().max() <= tolerance:
        raise Unknown("its scores are more than a weighted sum of positive products")
    if (seen.masked_fill(~later, -torch.inf) > MASKED).any():
        raise Unknown("it chooses among later keys")
