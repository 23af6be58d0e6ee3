"""Attention written out: anchored at its softmax, proven by numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_attention.match.axes import BATCH_AXIS, HEADS, SEQUENCE, Atom, Group
from ad_attention.match.distance_bias import DistanceBias, read_distance_bias
from ad_attention.match.evaluate import Evaluation, Unknown, check_written, cone, dtype_of
from ad_attention.match.mask_classifier import Classifier, MaskKind
from ad_attention.match.proposal import OP, declined, propose
from ad_attention.match.scores import Chain, factors, is_over_sequence, read_chain
from ad_attention.scores import query_bias
from ad_core.api import Declined, Matcher, Proposal


class SoftmaxMatcher(Matcher):
    """Every softmax over the sequence: up to the query-key product, down to the value product.

    What lies between is not recognised op by op. The scale and the soft-cap are read from the constants on the way, the mask and the
    bias are what zero scores become; then the weights of random scores must be those that the canonical op would give them. What
    queries have of their own, sinks and biases by distance, are values of the model: zero for the one, random for the other.
    """

    name = "attention.softmax"
    produces = OP

    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        classifier = Classifier(graph)
        for node in list(graph.graph.nodes):
            try:
                if not is_over_sequence(node, classifier.sizes):
                    continue
                chain = read_chain(node, classifier.sizes)
                bias = read_distance_bias(_sides(chain), chain.scores.query.num_heads, graph, classifier.sizes)
                scale, softcap, mask = _read(chain, bias, classifier)
                yield propose(
                    nodes=chain.nodes,
                    query=chain.scores.query,
                    key=chain.scores.key,
                    value=chain.output.value,
                    output=chain.output.output,
                    scale=scale,
                    softcap=softcap,
                    mask=mask,
                    sinks=chain.sinks,
                    bias=bias,
                    sizes=classifier.sizes,
                )
            except Unknown as why:
                yield declined(node, why)


def _sides(chain: Chain) -> set[Node]:
    """What is added to the scores, or hides some, and does not follow from them; sinks aside."""
    sides = {needed for node in chain.middle for needed in node.all_input_nodes if needed not in chain.nodes}
    return sides - {chain.sinks}  # type: ignore[arg-type]


def _read(chain: Chain, bias: DistanceBias | None, classifier: Classifier) -> tuple[float, float | None, MaskKind]:
    check_written(chain.weights, chain.output.product.node)
    scale, softcap = factors(chain, classifier.evaluation(2, 7))
    inputs: set[Any] = _sides(chain)
    if chain.scores.product.node.target is torch.ops.aten.baddbmm.default:
        added: Any = chain.scores.product.node.args[0]
        check_written(added, chain.scores.product.node)
        inputs.add(added)
    if bias is not None:
        inputs.remove(bias.side)
        inputs |= {needed for node, before in bias.links for needed in node.all_input_nodes if needed is not before}
    sides = {node for side in inputs for node in cone(side, without=chain.sinks)}
    before = chain.softmax.args[0]
    dtype = chain.scores.product.node.meta["val"].dtype
    heads = chain.scores.query.num_heads

    def zeros(evaluation: Evaluation) -> torch.Tensor:
        shape = (evaluation.batch, heads, evaluation.length, evaluation.length)
        own = {node: torch.zeros(evaluation.shape(node), dtype=node.meta["val"].dtype) for node in _own(chain, bias)}
        values = _evaluate(chain, bias, evaluation, torch.zeros(shape, dtype=dtype), own, before)
        # views in between may have taken batch and heads apart; that they did so in this order, the proof will show
        return values.reshape(evaluation.batch, heads, evaluation.length, -1)[..., : evaluation.length]

    mask = classifier.classify(zeros, sides | set(chain.middle))
    for length in (7, 21):
        _prove(chain, bias, classifier.evaluation(2, length), scale, softcap, mask)
    return scale, softcap, mask


def _own(chain: Chain, bias: DistanceBias | None) -> list[Node]:
    """The values of the model that the scores get."""
    return [node for node in (chain.sinks, None if bias is None else bias.source) if node is not None]


def _prove(chain: Chain, bias: DistanceBias | None, evaluation: Evaluation, scale: float, softcap: float | None, mask: MaskKind) -> None:
    """Random scores must get the weights that the canonical op gives them. Raises `Unknown` if they do not."""
    length, heads = evaluation.length, chain.scores.query.num_heads
    random = torch.Generator().manual_seed(length)
    dtype = chain.scores.product.node.meta["val"].dtype
    scores = (3 / max(abs(scale), 1e-6) * torch.randn(evaluation.batch, heads, length, length, generator=random)).to(dtype)
    own = {node: torch.randn(evaluation.shape(node), generator=random).to(node.meta["val"].dtype) for node in _own(chain, bias)}
    found = _by_heads(_evaluate(chain, bias, evaluation, scores, own, chain.weights), chain.output.weights, evaluation)
    wanted = scores.float() * scale
    if softcap is not None:
        wanted = softcap * torch.tanh(wanted / softcap)
    steps = torch.arange(length)
    if mask.slopes is not None:
        wanted = wanted + mask.slopes[:, None, None] * (steps[None, :] - steps[:, None])
    if bias is not None:
        rows = bias.without_cuts(own[bias.source], evaluation)
        wanted = wanted + query_bias(rows.transpose(1, 2).float(), steps, steps)
    wanted = wanted.masked_fill(~mask.allowed(length), float("-inf"))
    if chain.sinks is not None:
        column = own[chain.sinks].float()
        column = column if chain.has_query_sinks else column[:, None, None].expand(*wanted.shape[:3], 1)
        wanted = torch.cat([wanted, column], -1)
    wanted = wanted.softmax(-1)[..., :length]
    coarsest = max(torch.finfo(dtype).eps for dtype in map(dtype_of, chain.nodes) if dtype is not None and dtype.is_floating_point)
    if found.shape != wanted.shape or not (found.float() - wanted).abs().max() <= 40 * coarsest:
        raise Unknown("its scores go through more than a scale, a soft-cap, a position bias and a mask")


def _evaluate(
    chain: Chain, bias: DistanceBias | None, evaluation: Evaluation, scores: torch.Tensor, own: Mapping[Node, torch.Tensor], at: Any
) -> torch.Tensor:
    """The value of `at` for scores [B, H, S, S] (before the scale) and the values of the model's that `own` gives."""
    product = chain.scores.product.node
    values = _from_heads(scores, chain.scores.groups, evaluation)
    if product.target is torch.ops.aten.baddbmm.default:
        added = evaluation.value(product.args[0])  # type: ignore[arg-type]
        values = float(product.kwargs.get("beta", 1.0)) * added + chain.scores.product.alpha * values  # type: ignore[arg-type]
    dependent = frozenset((*chain.middle, chain.softmax, *chain.after)) | _below(chain.sinks, chain)
    if bias is not None:
        dependent |= bias.dependent
    value: torch.Tensor = evaluation.over({product: values, **own}, dependent).value(at)
    return value


def _below(sinks: Node | None, chain: Chain) -> frozenset[Node]:
    """Nodes that the sinks reach on their way into the scores."""
    if sinks is None:
        return frozenset()
    found: set[Node] = set()
    stack = [sinks]
    while stack:
        for user in stack.pop().users:
            if user not in found and user not in chain.nodes:
                found.add(user)
                stack.append(user)
    return frozenset(found)


def _from_heads(scores: torch.Tensor, groups: tuple[Group, ...], evaluation: Evaluation) -> torch.Tensor:
    """[B, H, S, S] in the dimensions of `groups`, of which the last two are query and key positions."""
    atoms, order = _atoms(groups)
    apart = scores.reshape([_size(atoms[at], evaluation) for at in order]).permute([order.index(at) for at in range(len(order))])
    return apart.reshape([prod(_size(atom, evaluation) for atom in group) for group in groups])


def _by_heads(values: torch.Tensor, groups: tuple[Group, ...], evaluation: Evaluation) -> torch.Tensor:
    """[B, H, S, S] of a tensor in the dimensions of `groups`."""
    atoms, order = _atoms(groups)
    apart = values.reshape([_size(atom, evaluation) for atom in atoms]).permute(order)
    return apart.reshape(evaluation.batch, -1, evaluation.length, evaluation.length)


def _atoms(groups: tuple[Group, ...]) -> tuple[list[Atom], list[int]]:
    """All atoms in their order, and where in it batch, heads (slowest first), query and key positions are."""
    atoms = [atom for group in groups for atom in group]
    ranks = {BATCH_AXIS: 0, HEADS: 1, SEQUENCE: 2}
    return atoms, sorted(range(len(atoms)), key=lambda at: (ranks[atoms[at].kind], atoms[at].order))


def _size(atom: Atom, evaluation: Evaluation) -> int:
    return {BATCH_AXIS: evaluation.batch, SEQUENCE: evaluation.length}.get(atom.kind, atom.size)
