"""What a module does with positions: where it begins to count, and how far its table of them goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.api.errors import ConfigError
from ad_core.capture import open_model
from tests.zoo.models import build, entries

from .models import Toy


def of_zoo(name, folder):
    """(in memory, from disk)"""
    module = build(entries()[name])
    module.save_pretrained(folder)
    return open_model(module), open_model(folder)


@pytest.mark.parametrize(
    ("name", "otherwise", "rows_not_for_text"),
    [("roberta", True, 2), ("gpt2", False, 0), ("opt", False, 0), ("llama", False, 0)],
)
def test_where_counting_begins_and_what_that_leaves_of_the_table(name, otherwise, rows_not_for_text, tmp_path):
    config = entries()[name].config
    said = config.get("max_position_embeddings") or config["n_positions"]
    for source in of_zoo(name, tmp_path):
        assert source.counts_otherwise is otherwise
        assert source.max_model_len == said - rows_not_for_text
        with pytest.raises(ConfigError, match=f"max_model_len {said + 1} is more than the model's {said - rows_not_for_text}"):
            open_model(tmp_path, max_model_len=said + 1)


class Placed(Toy):
    def __init__(self):
        super().__init__()
        self.places = nn.Embedding(33, 16)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device)))


def test_a_table_says_how_long_a_sequence_may_be_where_no_configuration_does():
    module = Placed()
    weights = {name: id(tensor) for name, tensor in module.named_parameters()}
    assert open_model(module).max_model_len == 33
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == weights


def test_a_forward_that_breaks_while_it_is_watched_costs_nothing():
    class Breaking(Placed):
        def forward(self, input_ids):
            if float(super().forward(input_ids).sum()) > 0:  # a number that only weights can give
                raise AssertionError("not here")
            return super().forward(input_ids)

    source = open_model(Breaking())
    assert (source.counts_otherwise, source.max_model_len) == (False, 33)
