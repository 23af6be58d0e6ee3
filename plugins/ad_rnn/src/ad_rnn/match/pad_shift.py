"""A padding that moves every token on by one: one row of zeros before the first, the last row cut off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ad_core.api import Declined, Matcher, Proposal
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import is_op

if TYPE_CHECKING:
    from torch.fx import GraphModule

_PADS = ("aten::constant_pad_nd", "aten::pad")
_SHIFT = [0, 0, 1, -1]


class PadShift(Matcher):
    name = "rnn.pad_shift"
    produces = "ad_rnn::token_shift"

    def find(self, graph: GraphModule) -> Iterable[Proposal | Declined]:
        import torch

        for node in graph.graph.nodes:
            if not is_op(node, *_PADS):
                continue
            given = bound_arguments(node)
            if list(given["pad"]) != _SHIFT or given.get("mode", "constant") != "constant":
                continue
            shape = given["self"].meta["val"].shape
            if len(shape) != 3 or not isinstance(shape[1], torch.SymInt):
                yield Declined(f"{node.name} moves rows of {tuple(shape)}, which are not tokens [B, S, D]")
            elif given["value"] not in (0, 0.0, None):
                yield Declined(f"{node.name} puts {given['value']} before the first token, and a state starts at zero")
            else:
                yield Proposal(output=node, nodes=frozenset({node}), arguments={"x": given["self"]})
