"""Causal convolutions as ATen nodes: one conv1d whose left padding makes it causal, and the SiLU behind it.

Three spellings of the padding: conv1d pads both ends by K - 1 and the tail is cut off; `pad` puts K - 1 zeros in front; a `cat` does.
With a dilation K counts the zeros between the taps: the canonical op has them as taps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_conv.op import OP
from ad_core.api import Declined, Matcher, Proposal
from ad_core.graph.calls import bound_arguments, module_path
from ad_core.graph.edit import insert_call, is_op

aten = torch.ops.aten


class Unknown(Exception):
    """Why this conv1d is not a causal convolution of one filter a channel."""


@dataclass(frozen=True)
class _Found:
    """`source` [B, C, S] goes in, `output` [B, C, S] comes out, before any activation."""

    source: Node
    output: Node
    nodes: tuple[Node, ...]


class AtenConv1dMatcher(Matcher):
    """Every `aten.conv1d` with one filter a channel that sees no later token."""

    name = "conv.aten"
    produces = OP

    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        for node in list(graph.graph.nodes):
            if not is_op(node, "aten::conv1d", "aten::convolution"):
                continue
            try:
                yield _read(node)
            except Unknown as why:
                yield Declined(f"{node.name} in {module_path(node) or 'the model'}: {why}")


def _read(node: Node) -> Proposal:
    arguments = bound_arguments(node)
    source, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if source.meta["val"].dim() != 3 or weight.meta["val"].dim() != 3:
        raise Unknown("it is not a convolution along one axis")
    channels, per_group, width = (int(extent) for extent in weight.meta["val"].shape)
    if per_group != 1 or arguments["groups"] != channels:
        raise Unknown(f"it mixes channels: {arguments['groups']} groups of {per_group} channels")
    if list(arguments["stride"]) != [1] or arguments.get("transposed"):
        raise Unknown("it has a stride or is transposed")
    padding = arguments["padding"]
    if isinstance(padding, str):
        raise Unknown(f"its padding is {padding!r}")
    (apart,) = arguments["dilation"]
    span = (width - 1) * apart + 1
    found = _padded_inside(node, source, span) if list(padding) == [span - 1] and span > 1 else None
    if found is None and list(padding) == [0]:
        found = _padded_before(node, source, span)
    if found is None:
        raise Unknown(f"its padding {list(padding)} does not make a kernel of {span} causal")
    silu = next((user for user in found.output.users if is_op(user, "aten::silu")), None)
    fused = silu is not None and len(found.output.users) == 1
    output = silu if fused and silu is not None else found.output
    if any(value.meta["val"].dtype != found.source.meta["val"].dtype for value in (weight, output)):
        raise Unknown("its weight has another dtype than its input")

    def prepare(graph: GraphModule) -> Mapping[str, Any]:
        return {
            "x": insert_call(output, aten.transpose.int, found.source, 1, 2),
            "weight": _spread(output, insert_call(output, aten.squeeze.dim, weight, 1), apart),
        }

    def rewrite(graph: GraphModule, result: Node) -> Node:
        return insert_call(output, aten.transpose.int, result, 1, 2)

    return Proposal(
        output=output,
        nodes=frozenset({*found.nodes, node, found.output, output}),
        arguments={"x": found.source, "weight": weight, "bias": bias, "activation": "silu" if fused else ""},
        prepare=prepare,
        rewrite=rewrite,
    )


def _spread(before: Node, weight: Node, apart: int) -> Node:
    """Taps [C, K] that lie `apart`, with zeros between them: [C, (K - 1) * apart + 1]."""
    if apart == 1:
        return weight
    columns = insert_call(before, aten.unsqueeze.default, weight, 2)
    columns = insert_call(before, aten.constant_pad_nd.default, columns, [apart - 1, 0])
    return insert_call(before, aten.slice.Tensor, insert_call(before, aten.flatten.using_ints, columns, 1), 1, apart - 1)


def _padded_inside(node: Node, source: Node, width: int) -> _Found:
    """Both ends are padded; what reads the result reads its first S columns."""
    cuts = [user for user in node.users if is_op(user, "aten::slice")]
    other = [user.name for user in node.users if user not in cuts]
    if other or len(cuts) != 1:
        raise Unknown(f"its tail of {width - 1} later outputs is read by {', '.join(other) or 'several cuts'}")
    (cut,) = cuts
    arguments = bound_arguments(cut)
    along = arguments["dim"] % 3 == 2 and arguments["start"] in (None, 0) and arguments["step"] == 1
    if not along or not _same(cut.meta["val"].shape[2], source.meta["val"].shape[2]):
        raise Unknown(f"{cut.name} does not keep just its first outputs, one a token")
    return _Found(source, cut, (cut,))


def _padded_before(node: Node, padded: Node, width: int) -> _Found | None:
    """Zeros stand in front of the input."""
    if width == 1:
        return _Found(padded, node, ())
    arguments = bound_arguments(padded) if padded.op == "call_function" and not isinstance(padded.target, str) else {}
    if is_op(padded, "aten::pad", "aten::constant_pad_nd"):
        pads = list(arguments["pad"])
        constant = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
        if constant and pads[:2] == [width - 1, 0] and not any(pads[2:]):
            return _Found(arguments["self"], node, (padded,))
    if is_op(padded, "aten::cat") and len(arguments["tensors"]) == 2 and arguments["dim"] % 3 == 2:
        zeros, source = arguments["tensors"]
        if is_op(zeros, "aten::zeros", "aten::new_zeros", "aten::zeros_like") and zeros.meta["val"].shape[2] == width - 1:
            return _Found(source, node, (padded,))
    return None


def _same(one: Any, other: Any) -> bool:
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (one, other)]
    return bool(expressions[0] == expressions[1])
