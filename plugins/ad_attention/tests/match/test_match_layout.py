"""Dimensions followed through views: where batch, heads, sequence and features lie, and what a repeated key was made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_attention.match.axes import FEATURE, HEADS, SEQUENCE, best, layouts_above
from ad_attention.match.contraction import layout_of, read_scores
from ad_attention.match.evaluate import Sizes, Unknown


class Views(nn.Module):
    """One view of a tensor [B, S, 4, 8] that is no view itself."""

    def __init__(self, view):
        super().__init__()
        self.embed = nn.Embedding(96, 32)
        self.view = view

    def forward(self, input_ids, position_ids):
        return self.view(torch.relu(self.embed(input_ids).view(*input_ids.shape, 4, 8)))


def graph_of(driver, view):
    graph = driver.export(Views(view))
    relu = next(node for node in graph.graph.nodes if node.target is torch.ops.aten.relu.default)
    return graph, relu, graph.graph.output_node().args[0]


def expand(x, times):
    b, s, h, d = x.shape
    return x[:, :, :, None].expand(b, s, h, times, d).reshape(b, s, h * times, d)


PATHS = {
    "transpose": lambda x: x.transpose(1, 2),
    "permute and back": lambda x: x.permute(0, 2, 3, 1).mT.contiguous(),
    "flattened heads": lambda x: x.transpose(1, 2).reshape(-1, x.shape[1], 8),
    "expand": lambda x: expand(x, 3).transpose(1, 2),
    "repeat_interleave": lambda x: x.transpose(1, 2).repeat_interleave(2, 1),
    "repeated and flattened": lambda x: expand(x, 2).transpose(1, 2).reshape(-1, x.shape[1], 8),
    "up and down": lambda x: x.unsqueeze(1).transpose(1, 2).squeeze(2).transpose(1, 2).double(),
    "split heads": lambda x: x.transpose(1, 2).reshape(x.shape[0], 2, 2, x.shape[1], 8),
}


@pytest.mark.parametrize("view", PATHS.values(), ids=PATHS.keys())
def test_views_are_followed_to_the_tensor_that_they_were_made_of(driver, view):
    graph, relu, result = graph_of(driver, view)
    sizes = Sizes(graph)
    kinds = [HEADS] * (result.meta["val"].dim() - 2) + [SEQUENCE, FEATURE]
    found = best(layouts_above(layout_of(result, kinds, sizes), sizes, repeats=True))
    assert found.node is relu
    assert found.permutation() == [0, 1, 2, 3]
    assert found.num_heads == 4


STOPS = {
    "tiled": lambda x: x.transpose(1, 2).repeat(1, 2, 1, 1),
    "slowest repeated": lambda x: x.transpose(1, 2)[:, None].expand(-1, 3, -1, -1, -1).reshape(x.shape[0], 12, x.shape[1], 8),
    "rounded": lambda x: x.transpose(1, 2).bfloat16(),
    "shifted": lambda x: x.transpose(1, 2) + 1,
}


@pytest.mark.parametrize("view", STOPS.values(), ids=STOPS.keys())
def test_what_is_no_view_or_no_grouping_is_not_looked_through(driver, view):
    graph, relu, result = graph_of(driver, view)
    sizes = Sizes(graph)
    layout = layout_of(result, [HEADS, HEADS, SEQUENCE, FEATURE], sizes)
    found = best(layouts_above(layout, sizes, repeats=True))
    assert found.node is not relu
    assert found.num_heads == result.meta["val"].shape[1]


def test_heads_are_not_unrepeated_unless_asked(driver):
    graph, _, result = graph_of(driver, lambda x: x.transpose(1, 2).repeat_interleave(2, 1))
    sizes = Sizes(graph)
    layout = layout_of(result, [HEADS, HEADS, SEQUENCE, FEATURE], sizes)
    assert best(layouts_above(layout, sizes, repeats=False)).num_heads == 8


def test_products_that_are_no_scores(driver):
    graph, _, result = graph_of(driver, lambda x: x @ x.mT)  # heads by heads, for each token
    assert read_scores(result, Sizes(graph)) is None
    graph, _, result = graph_of(driver, lambda x: torch.einsum("bihd,bjgd->bhgij", x, x))  # every head with every other
    with pytest.raises(Unknown, match="do not share keys in groups"):
        read_scores(result, Sizes(graph))
