"""The indexer is found by its shape and proven by numbers; what only looks like it is declined with the difference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_attention.plugin import ad_mixers
from ad_attention.sparse.match import IndexerMatcher
from ad_core.api import Declined
from ad_core.graph.edit import flat_module

HEADS, DIM, COUNT, HIDDEN = 5, 8, 6, 24


class Indexer(nn.Module):
    """Chooses positions from hidden states; subclasses change one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.weight = nn.Linear(HIDDEN, HEADS * DIM), nn.Linear(HIDDEN, DIM), nn.Linear(HIDDEN, HEADS)

    def mask(self, scores: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(scores.shape[1])
        return scores.masked_fill(steps > steps[:, None], -torch.inf)

    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.relu(scores * 0.3)

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(min(COUNT, scores.shape[-1]), -1).indices

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query = self.query(hidden).unflatten(2, (HEADS, DIM))
        scores = self.positive(torch.matmul(query, self.key(hidden).transpose(1, 2).unsqueeze(1)))
        return self.best(self.mask(torch.matmul(self.weight(hidden).unsqueeze(-2), scores).squeeze(-2)))


class AddedMask(Indexer):
    def mask(self, scores):
        steps = torch.arange(scores.shape[1])
        return scores + torch.where(steps > steps[:, None], torch.finfo(torch.float32).min, 0.0)


class SeesAll(Indexer):
    def mask(self, scores):
        steps = torch.arange(scores.shape[1])
        return scores.masked_fill(steps > steps[:, None] + 1, -torch.inf)


class Window(Indexer):
    def mask(self, scores):
        steps = torch.arange(scores.shape[1])
        return scores.masked_fill((steps > steps[:, None]) | (steps < steps[:, None] - 5), -torch.inf)


class Smooth(Indexer):
    def positive(self, scores):
        return nn.functional.silu(scores)


class Shifted(Indexer):
    def positive(self, scores):
        return torch.relu(scores * 0.3) + 0.5


class Worst(Indexer):
    def best(self, scores):
        return scores.topk(min(COUNT, scores.shape[-1]), -1, largest=False).indices


def found(model: nn.Module) -> list:
    ad_mixers()
    torch.manual_seed(0)
    shapes = {"hidden": {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=512)}}
    exported = torch.export.export(
        model.eval(), (torch.randn(2, 12, HIDDEN),), dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )
    return list(IndexerMatcher().find(flat_module(exported.module())))


@pytest.mark.parametrize("kind", [Indexer, AddedMask])
def test_both_spellings_of_the_mask_are_found(kind):
    (proposal,) = found(kind())
    assert not isinstance(proposal, Declined), proposal
    assert (proposal.arguments["count"], proposal.arguments["scale"]) == (COUNT, 0.3)
    assert [tuple(proposal.arguments[name].meta["val"].shape[2:]) for name in ("query", "key", "weight")] == [
        (HEADS, DIM),
        (DIM,),
        (HEADS,),
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SeesAll, "among later keys"),
        (Window, "more than a weighted sum"),
        (Smooth, "not the positive part"),
        (Shifted, "not the positive part"),
        (Worst, "more is used of it"),
    ],
)
def test_a_near_miss_is_declined_with_its_reason(kind, reason):
    (declined,) = found(kind())
    assert isinstance(declined, Declined)
    assert reason in declined.reason
