"""Ids that mean padding to a model are ordinary tokens here: a sequence of the engine holds none."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Stage
from ad_core.graph.axes import Sizes
from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import find_input, insert_call, is_op, remove_dead_code, replace
from ad_core.passes.positions import size_values

aten = torch.ops.aten

_CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")
_COUNTS = ("aten::cumsum", "aten::sum")


class NoPadding(Pass):
    """`input_ids != PAD`, where a model counts along the tokens what is no padding, becomes true everywhere: the count is then one
    of positions or lengths. PAD is what the embedding of the ids has for its padding; other comparisons stay."""

    name = "core.padding"
    stage = Stage.CLEAN
    after = ("core.asserts", "core.functional", "core.clean")
    before = ("core.positions",)

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        report = PassReport()
        ids = find_input(graph, "input_ids")
        if ids is None:
            return report
        for node in list(ids.users):
            if is_op(node, "aten::ne") and node.args[1] in _padding(ids) and _counted(node):
                _make_true(node, ids)
                report.matched += 1
                report.notes.append(f"ids equal to {node.args[1]} are text here and not padding, which no sequence of the engine holds")
        if report.matched:
            _settle(graph, ids)
            remove_dead_code(graph)
        return report


def _settle(graph: GraphModule, ids: Node) -> None:
    """Masks of tokens [B, S] that are true everywhere, now that every token counts: they read no length any more."""
    sizes = Sizes(graph)
    for node, values in size_values(graph, (sizes, sizes.other_length())).items():
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() != 2 or is_op(node, "aten::ones"):
            continue
        if str(value.shape) == str(ids.meta["val"].shape) and all(bool(each.all()) for each in values):
            _make_true(node, ids)


def _padding(ids: Node) -> set[Any]:
    """What embeddings of the ids keep at zero."""
    found = {bound_arguments(user)["padding_idx"] for user in ids.users if is_op(user, "aten::embedding")}
    return found - {-1}


def _counted(node: Node) -> bool:
    """Whether a sum along the tokens reads the node, through casts."""
    return any(is_op(user, *_COUNTS) and _along_tokens(user) for user in node.users) or any(
        is_op(user, *_CASTS) and _counted(user) for user in node.users
    )


def _along_tokens(node: Node) -> bool:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return dims in (1, -1, [1], [-1])


def _make_true(node: Node, ids: Node) -> None:
    shape = [insert_call(node, aten.sym_size.int, ids, dim) for dim in (0, 1)]
    replace(node, insert_call(node, aten.ones.default, shape, dtype=torch.bool, device=node.meta["val"].device))
