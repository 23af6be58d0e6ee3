"""The clean-up passes remove what they should, keep what they must, and never change a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api import Stage
from ad_core.graph.edit import is_op, mutates
from ad_core.graph.verify import violations
from ad_core.passes.asserts import RemoveAsserts
from ad_core.passes.clean import RemoveNoOps
from ad_core.passes.core import clean_passes
from ad_core.passes.devices import SetDevices
from ad_core.passes.duplicates import MergeDuplicates
from ad_core.passes.functional import MakeFunctional
from ad_core.passes.transposes import CancelTransposes

from ..exported import VOCABULARY, apply, export, export_model, ops, run, sample

F = nn.functional
D = 12


class Around(nn.Module):
    """A function of [B, S, D] between embedding and head."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.function = function

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(self.embedding(input_ids)))


def around(function: Callable[[torch.Tensor], torch.Tensor]) -> GraphModule:
    return export(Around(function))


# -- in-place ops -----------------------------------------------------------------------------------------------------


def into_slices(x):
    out = x.new_empty(x.shape)
    out[..., :4] = x[..., 4:8]
    out[..., 4:] = x[..., :8] * 2
    return out


def view_read_later(x):
    base = x * 2
    view = base.transpose(1, 2)
    base.add_(1)
    return view.transpose(1, 2) * base


def base_read_later(x):
    base = x * 2
    base[..., 3].mul_(5)
    base.transpose(1, 2)[:, 2:4].zero_()
    return base


def promoted(x):
    y = (x * 3).to(torch.bfloat16)
    y.mul_(x)  # float32 rounds back into the memory of y
    return y.float()


def through_a_view(x):
    base = x * 2
    base.view(x.shape[0], -1).clamp_(min=0)
    return base


def twice_and_the_old_value(x):
    y = x + 1
    before = y * 3
    y.mul_(2)
    y.sub_(1)
    return y + before


def scattered(x):
    mask = torch.zeros_like(x)
    mask.scatter_(-1, x.topk(3, -1).indices, 1.0)
    picked = torch.empty_like(x[..., 0].flatten(), dtype=torch.int64)
    order = x[..., 0].flatten().argsort()
    picked[order] = torch.arange(order.shape[0])
    return x.masked_fill_(mask == 0, 0.5) + picked.view(x.shape[:2])[..., None]


def split_in_two(x):
    y = x + 0.5
    left, right = y.chunk(2, -1)
    left = left.exp()
    return torch.cat([left.neg_(), right], -1)


IN_PLACE = [into_slices, view_read_later, base_read_later, promoted, through_a_view, twice_and_the_old_value, scattered, split_in_two]


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_in_place_ops_become_values_and_nothing_changes(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = around(function)
    assert any(mutates(node) for node in graph.graph.nodes)
    wanted = run(graph)
    _, report = apply(graph, [RemoveAsserts(), MakeFunctional()])
    assert report.matched
    assert report.declined == []
    assert not any(mutates(node) for node in graph.graph.nodes)
    assert torch.equal(run(graph), wanted)
    apply(graph, [RemoveNoOps(), MergeDuplicates()])
    assert torch.equal(run(graph), wanted)
    with torch.no_grad():
        for shape in ((1, 1), (3, 5)):
            torch.testing.assert_close(run(graph, *shape), Around(function)(*sample(*shape, positions=False)))


def test_a_write_to_a_weight_is_declined() -> None:
    class Counting(Around):
        def __init__(self) -> None:
            super().__init__(lambda x: x)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return super().forward(input_ids)

    graph = export(Counting())
    (report,) = apply(graph, [MakeFunctional()])
    assert not report.matched
    # Export may have turned the write into a copy at the end: either way something still writes, and it is said.
    assert any(mutates(node) for node in graph.graph.nodes) == bool(report.declined)


def test_a_view_that_cannot_be_followed_is_declined() -> None:
    def unclear(x):
        base = x * 2
        base.unfold(-1, 4, 4).add_(1)
        return base

    graph = around(unclear)
    (report,) = apply(graph, [MakeFunctional()])
    assert "no inverse" in report.declined[0]
    assert any(mutates(node) for node in graph.graph.nodes)


# -- no-ops -----------------------------------------------------------------------------------------------------------

REMOVED = {
    "cast to the same dtype": lambda x: x.to(torch.float32),
    "type as": lambda x: x.type_as(x * 2),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "view": lambda x: x.view(x.shape[0], -1, D),
    "expand": lambda x: x.expand(x.shape[0], -1, -1),
    "full slice": lambda x: x[:, 0:],
    "times one": lambda x: x * 1.0,
    "integer plus zero": lambda x: x + (torch.arange(x.shape[1])[:, None] + 0),
}
KEPT = {
    "cast": (lambda x: x.to(torch.bfloat16).float(), "aten::to"),
    "dropout that drops": (lambda x: F.dropout(x, 0.5, training=True) * 0, "aten::dropout"),
    "contiguous of a transpose": (
        lambda x: x.transpose(0, 1).contiguous().view(-1, D).view(x.shape[1], x.shape[0], D).transpose(0, 1),
        "aten::contiguous",
    ),
    "float plus zero": (lambda x: x + 0.0, "aten::add"),
    "times true one of another dtype": (lambda x: (x > 0) * 1.0, "aten::mul"),
    "broadcast": (lambda x: x[:, :, :1].expand(-1, -1, D), "aten::expand"),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_call_that_gives_back_what_it_got_is_removed(name: str) -> None:
    graph = around(REMOVED[name])
    wanted = run(graph)
    apply(graph, [RemoveAsserts()])
    before = ops(graph)
    (report,) = apply(graph, [RemoveNoOps()])
    assert report.matched
    assert len(ops(graph)) < len(before)
    assert torch.equal(run(graph), wanted)


@pytest.mark.parametrize("name", KEPT)
def test_a_call_that_changes_something_stays(name: str) -> None:
    function, op = KEPT[name]
    graph = around(function)
    wanted = run(graph)
    apply(graph, [RemoveAsserts(), RemoveNoOps()])
    assert any(is_op(node, op) for node in graph.graph.nodes)
    assert torch.equal(run(graph), wanted)


def test_a_copy_stays_while_something_is_written_in_place() -> None:
    def write(x):
        y = x.clone()
        y.unfold(-1, 4, 4).add_(1)
        return y + x

    graph = around(write)
    wanted = run(graph)
    reports = apply(graph, [RemoveAsserts(), MakeFunctional(), RemoveNoOps()])
    assert reports[-1].notes[0].startswith("copies stay")
    assert torch.equal(run(graph), wanted)


# -- transposes and duplicates ------------------------------------------------------------------------------------------


def test_transposes_that_undo_each_other_go() -> None:
    graph = around(
        lambda x: x.view(*x.shape[:2], 3, 4).transpose(1, 2).transpose(-3, -2).permute(2, 0, 3, 1).permute(1, 3, 0, 2).flatten(2)
    )
    wanted = run(graph)
    (report,) = apply(graph, [CancelTransposes()])
    assert report.matched == 2
    assert not any(is_op(node, "aten::transpose", "aten::permute") for node in graph.graph.nodes)
    assert torch.equal(run(graph), wanted)


def test_transposes_that_do_not_undo_each_other_stay() -> None:
    graph = around(
        lambda x: x.view(*x.shape[:2], 3, 4).permute(2, 0, 3, 1).permute(2, 0, 3, 1).transpose(1, 2).flatten(2).flatten(1)[:, :D, None].mT
    )
    wanted = run(graph)
    (report,) = apply(graph, [CancelTransposes()])
    assert report.matched == 0
    assert torch.equal(run(graph), wanted)


def test_what_is_computed_twice_is_computed_once() -> None:
    graph = around(lambda x: x.sin().unsqueeze(0).squeeze(0) + x.sin().unsqueeze(0).squeeze(0))
    wanted = run(graph)
    (report,) = apply(graph, [MergeDuplicates()])
    assert report.matched == 3
    assert sum(is_op(node, "aten::sin") for node in graph.graph.nodes) == 1
    assert torch.equal(run(graph), wanted)


def test_constants_of_another_type_are_no_duplicates() -> None:
    graph = around(lambda x: (x.long() * 2 + 1).float() + (x.long() * 2.0 + 1) + F.dropout(x, 0.5, True) * 0 + F.dropout(x, 0.5, True) * 0)
    (report,) = apply(graph, [MergeDuplicates()])
    assert sum(is_op(node, "aten::mul") for node in graph.graph.nodes) == 4
    assert sum(is_op(node, "aten::dropout") for node in graph.graph.nodes) == 2
    assert report.matched  # x.long() twice


# -- devices ----------------------------------------------------------------------------------------------------------


def test_every_device_of_a_graph_traced_on_meta_becomes_the_model_s() -> None:
    with torch.device("meta"):
        model = Around(lambda x: x.to(x.device) + torch.arange(x.shape[1], device=x.device)[:, None].to(torch.float32))
    graph = export(model)
    assert "type='meta'" in graph.code
    (report,) = apply(graph, [SetDevices()], device="cpu")
    assert report.matched
    assert "type='meta'" not in graph.code
    assert {value.device.type for node in graph.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)} == {"cpu"}


# -- together -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_cleaned_model_is_canonical_and_computes_the_same_to_the_bit(kind: str) -> None:
    graph = export_model(kind)
    wanted = [run(graph, *shape) for shape in ((2, 11), (1, 1), (1, 33))]
    before = len(graph.graph.nodes)
    apply(graph, clean_passes())
    assert violations(graph, Stage.CLEAN) == []
    assert len(graph.graph.nodes) < 0.8 * before
    assert not any(
        is_op(node, "aten::cumsum", "aten::diff") for node in graph.graph.nodes if kind == "llama"
    )  # packed-sequence detection is dead
    for shape, logits in zip(((2, 11), (1, 1), (1, 33)), wanted, strict=True):
        assert torch.equal(run(graph, *shape), logits)
