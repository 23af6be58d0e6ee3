"""What a model counts as no padding is every token here; positions and masks that follow from the count become plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.graph.ops import qualified_name
from ad_core.passes.padding import NoPadding
from ad_core.passes.positions import OwnPositions

from ..exported import VOCABULARY, apply, export, run, sample

PAD, D = 1, 12


class Counting(nn.Module):
    """Positions counted from ids that are not PAD, and embeddings masked by a length that is counted likewise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.places, self.head = nn.Embedding(VOCABULARY, D, PAD), nn.Embedding(300, D), nn.Linear(D, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        kept = input_ids.ne(PAD).int()
        positions = (torch.cumsum(kept, dim=1).type_as(kept) * kept).long() + PAD
        lengths = (input_ids != PAD).sum(dim=1)
        mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
        return self.head((self.embedding(input_ids) + self.places(positions)) * mask[..., None])


class Choosing(Counting):
    """Compares ids, but counts nothing: an id may have a meaning."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids) * input_ids.ne(PAD)[..., None])


def logits(model: nn.Module) -> torch.Tensor:
    return model(*sample(2, 11, positions=False))


def test_counts_of_what_is_no_padding_become_positions():
    model = Counting()
    graph = export(model)
    (report,) = apply(graph, [NoPadding()])
    assert report.matched == 2
    assert f"ids equal to {PAD} are text" in report.notes[0]
    apply(graph, [OwnPositions()])
    assert not {"aten::cumsum", "aten::sum", "aten::ne", "aten::lt"} & called(graph)
    torch.testing.assert_close(run(graph), logits(model))


@pytest.mark.parametrize("change", ["no count", "no padding"])
def test_other_comparisons_of_ids_stay(change):
    model = Choosing() if change == "no count" else Counting()
    if change == "no padding":
        model.embedding.padding_idx = None
    graph = export(model)
    (report,) = apply(graph, [NoPadding()])
    assert report.matched == 0
    assert "aten::ne" in called(graph)


def called(graph: torch.fx.GraphModule) -> set[str]:
    return {qualified_name(node.target) for node in graph.graph.nodes}
