"""What a module does with positions: where it begins to count, and how far its table of them goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.api.errors import ConfigError
from ad_core.capture import open_model
from ad_core.capture.counting import LENGTH
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


class Held(Placed):
    """Positions beyond the table's end are held at its last row."""

    def forward(self, input_ids):
        return self.head(self.embed(input_ids) + self.places(torch.arange(input_ids.shape[1]).clamp(max=32)))


class Fixed(Toy):
    """A table of as many rows as there are tokens, by accident."""

    def __init__(self):
        super().__init__()
        self.kinds = nn.Embedding(LENGTH, 16)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids) + self.kinds(torch.arange(LENGTH)).sum(0))


@pytest.mark.parametrize("kind", [Held, Fixed])
def test_what_is_no_end_of_the_positions_bounds_nothing(kind):
    assert open_model(kind()).max_model_len is None


class Filled(Toy):
    def forward(self, input_ids, position_ids=None):
        x = self.embed(input_ids)
        turned = torch.empty(x.shape, device=x.device)
        turned[..., ::2], turned[..., 1::2] = x[..., 1::2], x[..., ::2]
        return self.head(x + turned + torch.empty_like(input_ids).zero_()[..., None])


def test_memory_that_is_filled_later_is_no_position():
    assert not any(open_model(Filled()).counts_otherwise for _ in range(5))


def test_what_a_forward_keeps_beside_its_module_is_not_kept_from_a_watch():
    class Table:
        made = None

    class Keeping(Placed):
        def __init__(self):
            super().__init__()
            self.table, self.calls = Table(), torch.zeros(1)

        def forward(self, input_ids):
            self.calls += 1
            if self.table.made is None:
                self.table.made = self.places.weight * 2
            return super().forward(input_ids)

    module = Keeping()
    assert open_model(module).max_model_len == 33
    assert (module.table.made, module.calls.item()) == (None, 0)


def test_a_module_that_cannot_be_copied_is_not_watched():
    class Alone(Placed):
        def __deepcopy__(self, memo):
            raise RuntimeError("there can be one")

    assert open_model(Alone(), max_model_len=99).max_model_len == 99


def test_a_forward_that_breaks_while_it_is_watched_costs_nothing():
    class Breaking(Placed):
        def forward(self, input_ids):
            if float(super().forward(input_ids).sum()) > 0:  # a number that only weights can give
                raise AssertionError("not here")
            return super().forward(input_ids)

    source = open_model(Breaking())
    assert (source.counts_otherwise, source.max_model_len) == (False, 33)
