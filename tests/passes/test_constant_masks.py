"""Rows of a batch that are chosen by a mask which no data decides: the choice is gone, and so is the size that depends on data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.graph.ops import qualified_name
from ad_core.graph.tokens import find_mixing
from ad_core.passes.constant_masks import ConstantMasks, uniform_values
from ad_core.passes.core import clean_passes

from ..exported import VOCABULARY, apply, cleaned, export, run, sample

D = 12


class Adapters(nn.Module):
    """One linear a language, for the rows of its language; all rows are of the default language unless `kinds` says otherwise."""

    def __init__(self, add: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.adapters = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.add = add

    def kinds(self, input_ids: torch.Tensor) -> torch.Tensor:
        return 1 * torch.ones(input_ids.shape[0])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden, kinds = self.embedding(input_ids), self.kinds(input_ids)
        adapted = torch.full_like(hidden, 0.5)
        for number, adapter in enumerate(self.adapters):
            mask = kinds == number
            rows = adapter(hidden[mask])
            if self.add:
                adapted = adapted.index_put((mask,), rows, accumulate=True)
            else:
                adapted[mask] = rows
        return self.head(hidden + adapted)


class ByData(Adapters):
    """The first token of a row says its language."""

    def kinds(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids[:, 0] % 3


class BySize(Adapters):
    """True everywhere at every length that a test would try, and not for ever."""

    def kinds(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.arange(input_ids.shape[0]) // 50 + 1


def called(graph) -> set[str]:
    return {qualified_name(node.target) for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("add", [False, True])
def test_a_mask_that_is_the_same_for_every_row_is_gone(add):
    model = Adapters(add)
    graph = cleaned(export(model))
    assert not {"aten::index", "aten::index_put", "aten::eq"} & called(graph)
    assert find_mixing(graph, ()) == []
    assert [node.target for node in graph.graph.nodes if node.op == "get_attr" and "adapters" in node.target] == [
        "adapters.1.weight",
        "adapters.1.bias",
    ]
    for batch, length in ((1, 1), (3, 7)):
        torch.testing.assert_close(run(graph, batch, length), model(*sample(batch, length, positions=False)))


@pytest.mark.parametrize("kind", [ByData, BySize])
def test_a_mask_that_rows_decide_stays(kind):
    graph = export(kind())
    apply(graph, [each for each in clean_passes() if each.name in ("core.asserts", "core.functional")])
    (report,) = apply(graph, [ConstantMasks()])
    assert report.matched == 0
    assert {"aten::index", "aten::index_put"} <= called(graph)


def test_where_something_is_written_in_place_nothing_is_known():
    (report,) = apply(export(Adapters()), [ConstantMasks()])
    assert (report.matched, report.notes) == (0, ["masks stay: the graph writes in place"])


def test_one_value_everywhere_is_known_by_how_it_is_made():
    class Made(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            twos = 2 * torch.ones(input_ids.shape[0])
            made = (twos.to(torch.int64)[:, None].expand(-1, input_ids.shape[1]) + 1) * torch.full((1, 1), 3)
            other = made + torch.arange(input_ids.shape[1])
            random = torch.rand_like(made.float())
            return torch.stack([made.float(), other.float(), random, (made == 9).float()], -1)

    graph = export(Made())
    known = {node.name: value for node, value in uniform_values(graph).items()}
    stack = next(node for node in graph.graph.nodes if qualified_name(node.target) == "aten::stack")
    made, other, random, equal = (known.get(node.name) for node in stack.args[0])
    assert (float(made), float(equal)) == (9.0, 1.0)
    assert other is None
    assert random is None
