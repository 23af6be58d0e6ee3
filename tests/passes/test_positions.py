"""Positions that a model counts itself become the input `position_ids`, in any spelling and with their offset."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.graph.edit import find_input
from ad_core.passes.core import clean_passes
from ad_core.passes.positions import OwnPositions

from ..exported import VOCABULARY, apply, export, export_model, ops, run, sample

D = 12


class Positioned(nn.Module):
    """Embeddings of ids plus embeddings of positions that `count(ids)` makes up."""

    def __init__(self, count: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.places, self.head = nn.Embedding(VOCABULARY, D), nn.Embedding(300, D), nn.Linear(D, VOCABULARY)
        self.count = count

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids) + self.places(self.count(input_ids)))


def spelled_by_ones(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(ids.shape, dtype=torch.int64)
    return (mask.cumsum(1) * mask).long() - 1 + 2


SPELLINGS = {
    "arange": (lambda ids: torch.arange(ids.shape[1]), 0),
    "arange in a row": (lambda ids: torch.arange(0, ids.shape[1])[None] + 0, 0),
    "arange of every row": (lambda ids: torch.arange(ids.shape[1]).expand_as(ids), 0),
    "cumulative sum of ones and an offset": (spelled_by_ones, 2),
    "int32": (lambda ids: torch.arange(ids.shape[1], dtype=torch.int32), 0),
    "float and back": (lambda ids: (torch.arange(ids.shape[1]).float() + 3).long(), 3),
    "reversed and reversed": (lambda ids: torch.flip(ids.shape[1] - 1 - torch.arange(ids.shape[1]), (0,)), 0),
}


def replaced(graph: GraphModule) -> GraphModule:
    apply(graph, clean_passes())
    return graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_any_spelling_becomes_the_input(name: str) -> None:
    count, offset = SPELLINGS[name]
    model = Positioned(count)
    graph = export(model)
    apply(graph, [each for each in clean_passes() if each.name != "core.positions"])
    wanted = run(graph)
    (report,) = apply(graph, [OwnPositions()])
    assert report.matched
    assert report.notes[-1].endswith(f"arange + {offset}" if offset else "arange")
    assert not {"aten.arange.default", "aten.cumsum.default", "aten.ones.default"} & set(ops(graph))
    assert torch.equal(run(graph), wanted)
    # And what comes in is what counts: other positions give what the embedding of those gives.
    (ids,) = sample(1, 5, positions=False)
    places = torch.tensor([[7, 8, 9, 0, 1]])
    with torch.no_grad():
        expected = model.head(model.embedding(ids) + model.places(places + offset))
        assert torch.equal(run(graph, 1, 5, position_ids=places), expected)


def test_rows_that_are_looked_up_in_one_dim_stay_as_many_as_the_batch_has() -> None:
    class Flat(Positioned):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            found = self.places(self.count(input_ids).view(-1)).view(*input_ids.shape, -1)
            return self.head(self.embedding(input_ids) + found)

    model = Flat(spelled_by_ones)
    graph = replaced(export(model))
    assert "aten.cumsum.default" not in ops(graph)
    assert torch.equal(run(graph, 3, 7), model(*sample(3, 7, positions=False)))
    assert torch.equal(run(graph, 1, 5), model(*sample(1, 5, positions=False)))


def test_positions_that_are_given_are_used_for_those_that_are_counted() -> None:
    class Both(Positioned):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) + position_ids[..., None]

    graph = replaced(export(Both(lambda ids: torch.arange(ids.shape[1])), positions=True))
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["input_ids", "position_ids"]
    assert "aten.arange.default" not in ops(graph)


def test_each_row_has_its_own_positions_where_the_model_leaves_room() -> None:
    """gpt2 counts one row [1, S] for all; the input's rows may differ."""
    graph = replaced(export_model("gpt2", positions=False))
    ids, _ = sample(2, 6, positions=True)
    places = torch.stack([torch.arange(6), torch.arange(6) + 9])
    together = run(graph, 2, 6, position_ids=places)
    alone = [run(graph, 1, 6, input_ids=ids[row : row + 1], position_ids=places[row : row + 1]) for row in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert not torch.allclose(together[1], run(graph, 2, 6, position_ids=places[:1].repeat(2, 1))[1])


def test_what_counts_data_stays() -> None:
    graph = export(Positioned(lambda ids: (ids != 7).long().cumsum(1)))
    apply(graph, clean_passes())
    assert find_input(graph, "position_ids") is None
    assert "aten.cumsum.default" in ops(graph)


def test_masks_keep_theirs_for_the_matchers() -> None:
    graph = export_model("llama", "sdpa")
    reports = apply(graph, [each for each in clean_passes() if each.name != "core.duplicates"])
    assert [report.matched for report, each in zip(reports, clean_passes(), strict=False) if each.name == "core.positions"] == [0]
    assert "aten.arange.default" in ops(graph)


def test_a_length_that_is_no_position_stays() -> None:
    graph = export(Positioned(lambda ids: torch.arange(ids.shape[1]) * 2))
    apply(graph, clean_passes())
    assert find_input(graph, "position_ids") is not None  # the arange inside is one
    assert run(graph, 1, 5, position_ids=torch.tensor([[0, 2, 4, 6, 8]])).shape == (1, 5, VOCABULARY)
    assert "aten.mul.Tensor" in ops(graph)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_model_that_counts_its_positions_computes_the_same(kind: str) -> None:
    graph = export_model(kind, positions=False)
    assert find_input(graph, "position_ids") is None
    wanted = run(graph, 2, 11)
    replaced(graph)
    assert find_input(graph, "position_ids") is not None
    assert torch.equal(run(graph, 2, 11), wanted)
