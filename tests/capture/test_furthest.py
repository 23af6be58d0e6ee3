"""Models whose tables depend on how long the whole sequence is: served up to where they are always the same, refused beyond."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.api.errors import CaptureError, ConfigError
from ad_core.capture import export_module
from ad_core.graph.ops import qualified_name

from . import models

WIDTH, VOCABULARY, SHORT = 12, 40, 32
"""Up to SHORT tokens a sequence has one table."""


class Tables(nn.Module):
    """Angles of positions, times `table`; another table for sequences of more than SHORT tokens. `choose` returns it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("table", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("short", torch.rand(WIDTH))
        self.register_buffer("long", torch.rand(WIDTH))

    def choose(self, length: torch.Tensor) -> torch.Tensor:
        return self.long if length > SHORT else self.short

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        table = self.choose(torch.max(position_ids) + 1)
        angles = position_ids[..., None] * table
        return self.head(self.embedding(input_ids) * angles.cos())


class Kept(Tables):
    """The table is chosen as by an if, and kept in the buffer, which is filled at every call."""

    def choose(self, length):
        self.table.copy_(torch.where(length > SHORT, self.long, self.short))
        return self.table


class Narrow(Kept):
    """Keeps its table in a narrower dtype than the one it is made in, as after a cast of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.short = self.table.bfloat16(), self.short.bfloat16()


class Asking(Tables):
    """Asks in many ways and spellings, and makes the same of every answer beyond SHORT."""

    def choose(self, length):
        last = length.long() - 1
        assert bool(length)
        return self.short if last < SHORT and last <= SHORT - 1 and length.add(1) < SHORT + 2 and not (last >= SHORT) else self.long


class Indifferent(Tables):
    """What it asks for long sequences makes no difference."""

    grown = False

    def choose(self, length):
        return self.long if length > 5 and self.grown else self.short


class ByData(Tables):
    """Asks about something that is no position."""

    def choose(self, length):
        return self.long if self.short.max() > 2 else self.short


def equal(model: nn.Module, max_length: int, length: int) -> None:
    graph = export_module(model.eval(), max_length=max_length).graph
    assert "aten::max" not in {qualified_name(node.target) for node in graph.graph.nodes}
    ids = torch.randint(0, VOCABULARY, (2, length))
    with torch.no_grad():
        torch.testing.assert_close(models.run(graph, ids), model(ids))


@pytest.mark.parametrize("kind", [Tables, Kept, Narrow, Asking])
def test_up_to_where_the_table_changes_the_short_one_is_the_graphs(kind):
    equal(kind(), SHORT, SHORT)


@pytest.mark.parametrize("kind", [Tables, Kept, Asking])
def test_where_longer_sequences_get_another_table_the_length_to_give_is_said(kind):
    with pytest.raises(ConfigError, match=f"more than {SHORT} tokens") as caught:
        export_module(kind().eval(), max_length=SHORT + 1)
    assert caught.value.hint == f"give max_model_len={SHORT}"


def test_a_question_without_consequence_limits_nothing():
    equal(Indifferent(), 4 * SHORT, 3 * SHORT)


def test_questions_about_other_tensors_are_not_answered():
    with pytest.raises(Exception, match="data-dependent"):
        export_module(ByData().eval(), max_length=SHORT)


def test_of_positions_without_an_end_nothing_is_known():
    with pytest.raises(Exception, match="data-dependent"):
        export_module(Tables().eval())


class Partly(Kept):
    """Fills half of what it keeps."""

    def choose(self, length):
        self.table[:6].copy_(self.short[:6])
        return self.table


class ReadBefore(Kept):
    """Reads what the last call left."""

    def choose(self, length):
        before = self.table * 0.5
        self.table.copy_(self.short)
        return self.table + before


class WrittenAfter(Kept):
    """Goes on writing to what it filled."""

    def choose(self, length):
        self.table.copy_(self.short)
        self.table.add_(1)
        return self.table


class SourceWrittenAfter(Kept):
    """What the buffer was filled with changes later, and the buffer does not."""

    def choose(self, length):
        made = self.short * 2
        self.table.copy_(made)
        made.add_(1)
        return self.table * made


@pytest.mark.parametrize("kind", [Partly, ReadBefore, WrittenAfter])
def test_a_buffer_that_remembers_anything_is_refused(kind):
    with pytest.raises(CaptureError, match="writes to what it keeps: table"):
        export_module(kind().eval(), max_length=SHORT)


def test_a_filled_buffer_does_not_follow_what_it_was_filled_with():
    equal(SourceWrittenAfter(), SHORT, 9)
