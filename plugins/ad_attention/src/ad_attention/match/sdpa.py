"""Attention as one ATen node, with its mask flag or a mask that the graph computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from ad_attention.match.axes import BATCH, FEATURE, HEADS, LENGTH, SEQUENCE, Layout
from ad_attention.match.contraction import layout_of
from ad_attention.match.evaluate import Evaluation, Sizes, Unknown, check_written, cone
from ad_attention.match.mask_classifier import Classifier, MaskKind
from ad_attention.match.proposal import OP, declined, propose
from ad_core.api import Declined, Matcher, Proposal
from ad_core.graph.calls import bound_arguments

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class SdpaMatcher(Matcher):
    """Every `aten.scaled_dot_product_attention` whose mask is causal, a window, a chunk, or ALiBi."""

    name = "attention.sdpa"
    produces = OP

    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        classifier = Classifier(graph)
        kinds: dict[Node, MaskKind | Unknown] = {}  # the layers of a model share their masks
        for node in list(graph.graph.nodes):
            if node.target is not SDPA:
                continue
            try:
                yield _read(node, classifier, kinds)
            except Unknown as why:
                yield declined(node, why)


def _read(node: Node, classifier: Classifier, kinds: dict[Node, MaskKind | Unknown]) -> Proposal:
    arguments, sizes = bound_arguments(node), classifier.sizes
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    if arguments["dropout_p"]:
        raise Unknown(f"it drops out weights ({arguments['dropout_p']}); export the model in eval mode")
    lengths = {operand.name: sizes.shape(operand, BATCH, LENGTH)[-2] for operand in (query, key, value)}
    if set(lengths.values()) != {LENGTH}:
        raise Unknown(f"its operands are not one sequence: {', '.join(name for name, length in lengths.items() if length != LENGTH)}")
    layouts = [_operand(operand, sizes) for operand in (query, key, value)]
    if not arguments["enable_gqa"] and any(layout.heads and layout.num_heads != layouts[0].num_heads for layout in layouts):
        raise Unknown("its operands have different numbers of heads")
    if isinstance(arguments["attn_mask"], Node):
        check_written(arguments["attn_mask"], node)
    width = query.meta["val"].shape[-1]
    scale = arguments["scale"] if arguments["scale"] is not None else width**-0.5
    return propose(
        nodes=[node],
        query=layouts[0],
        key=layouts[1],
        value=layouts[2],
        output=_operand(node, sizes),
        scale=float(scale),
        softcap=None,
        mask=_mask(arguments["attn_mask"], bool(arguments["is_causal"]), classifier, kinds),
        sinks=None,
        sizes=sizes,
    )


def _operand(node: Node, sizes: Sizes) -> Layout:
    rank = node.meta["val"].dim()
    if rank < 3:
        raise Unknown(f"{node.name} has {rank} dimensions")
    return layout_of(node, [*[HEADS] * (rank - 2), SEQUENCE, FEATURE], sizes)


def _mask(mask: Node | None, is_causal: bool, classifier: Classifier, kinds: dict[Node, MaskKind | Unknown]) -> MaskKind:
    if mask is None:
        if not is_causal:
            raise Unknown("it is not causal: it has neither a mask nor is_causal")
        return MaskKind()

    def additive(evaluation: Evaluation) -> torch.Tensor:
        value: torch.Tensor = evaluation.value(mask)
        if value.dtype == torch.bool:
            return torch.zeros(value.shape).masked_fill(~value, float("-inf"))
        return value

    if mask not in kinds:
        try:
            kinds[mask] = classifier.classify(additive, cone(mask))
        except Unknown as why:
            kinds[mask] = why
    kind = kinds[mask]
    if isinstance(kind, Unknown):
        raise kind
    return kind
