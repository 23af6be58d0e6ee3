"""A module may call its parts what it likes, also what a graph calls its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ad_core
from ad_core.graph.edit import tensor_path


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.meta, self.graph, self.code = nn.Embedding(16, 8), nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 16)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.code[0](self.graph(self.meta(input_ids)))


def test_parts_that_are_named_like_a_graphs_own_are_captured():
    module, ids = Named().eval(), torch.tensor([[3, 1, 4]])
    graph = ad_core.compile(module, max_model_len=16)
    torch.testing.assert_close(graph(ids), module(ids))


@pytest.mark.parametrize(
    ("name", "path"), [("meta.weight", "meta_.weight"), ("meta", "meta_"), ("metal.weight", "metal.weight"), ("layers.meta.weight",) * 2]
)
def test_only_the_first_part_of_a_name_gives_way(name, path):
    assert tensor_path(name) == path
