"""Logits for the wanted rows only: [R, V], equal to those rows of all logits, with the head computed for R rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.api import Declined
from ad_core.graph.edit import find_input, is_op, new_input
from ad_core.passes.output_rows import GatherOutputRows, gather_output_rows

from ..exported import VOCABULARY, apply, cleaned, export, export_model, run

ROWS = torch.tensor([2, 10, 5, 5])


def head_rows(graph: torch.fx.GraphModule, rows: torch.Tensor, length: int = 11) -> list[int]:
    """For how many rows every linear that is as wide as the vocabulary was computed."""
    seen: list[int] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> object:
            value = super().run_node(node)
            if is_op(node, "aten::linear") and value.shape[-1] == VOCABULARY:
                seen.append(value.numel() // VOCABULARY)
            return value

    inputs = {"input_ids": torch.zeros(1, length, dtype=torch.int64), "position_ids": torch.arange(length)[None], "output_rows": rows}
    Watch(graph).run(*(inputs[str(node.target)] for node in graph.graph.nodes if node.op == "placeholder"))
    return seen


@pytest.mark.parametrize(("kind", "way"), [("llama", "seam"), ("gpt2", "seam"), ("gemma2", "seam"), ("bloom", "eager"), ("opt", "seam")])
def test_logits_are_those_of_the_wanted_rows(kind: str, way: str) -> None:
    graph = cleaned(export_model(kind, way, positions=kind != "bloom"))
    all_logits = run(graph, 1, 11)
    (report,) = apply(graph, [GatherOutputRows()])
    assert report.matched == 1
    logits = run(graph, 1, 11, output_rows=ROWS)
    assert logits.shape == (4, VOCABULARY)
    torch.testing.assert_close(logits, all_logits[0, ROWS], rtol=1e-4, atol=1e-4)
    assert head_rows(graph, ROWS)[-1] == 4
    assert run(graph, 1, 3, output_rows=ROWS[:0]).shape == (0, VOCABULARY)  # a chunk in mid-prompt wants none
    assert run(graph, 1, 1, output_rows=torch.tensor([0])).shape == (1, VOCABULARY)


def test_a_soft_cap_on_logits_is_computed_for_the_rows_too() -> None:
    graph = cleaned(export_model("gemma2"))
    gather_output_rows(graph)
    ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert ops.index("aten.index_select.default") < len(ops) - 5  # above linear, division, tanh, product
    assert ops[-1] == "aten.select.int"


class Head(nn.Module):
    """A head after something."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8), nn.Linear(8, VOCABULARY)
        self.function = function

    def forward(self, input_ids):
        return self.function(self, self.embedding(input_ids))


CHAINS = {
    "a norm and a head": (lambda m, x: m.head(m.norm(x.sin() + x)), 1),
    "views of the features": (lambda m, x: m.head((x.sin() + x).view(x.shape[0], -1, 2, 4).flatten(2)), 1),
    "a view with the length": (lambda m, x: m.head((x.sin() + x).view(x.shape[0], x.shape[1], 2, 4).flatten(2)), 1),
    "logits that are read twice": (lambda m, x: (lambda y: y + y.amax(1, keepdim=True))(m.head(x)), None),
    "a scan above the head": (lambda m, x: m.head(x.cumsum(1)), 1),
    "a scan below the head": (lambda m, x: m.head(x).cumsum(1), None),
    "flat tokens": (lambda m, x: m.head(x.view(-1, 8)).view(x.shape[0], x.shape[1], VOCABULARY), None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_rows_are_gathered_as_far_up_as_tokens_are_apart(name: str) -> None:
    function, per_row = CHAINS[name]
    graph = cleaned(export(Head(function)))
    wanted = run(graph, 1, 11)[0, ROWS]
    assert not isinstance(gather_output_rows(graph), Declined)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(run(graph, 1, 11, output_rows=ROWS), wanted, rtol=1e-5, atol=1e-5)
    assert head_rows(graph, ROWS) == [11 if per_row is None else 4]


def test_an_input_that_is_there_is_used() -> None:
    graph = cleaned(export(Head(lambda m, x: m.head(x))))
    ids = find_input(graph, "input_ids").meta["val"]
    with ids.fake_mode:
        rows = new_input(graph, "output_rows", torch.empty(3, dtype=torch.int64))
    gather_output_rows(graph)
    assert sum(node.op == "placeholder" for node in graph.graph.nodes) == 2
    assert rows.users


def test_an_output_that_is_no_logits_is_declined() -> None:
    graph = cleaned(export(Head(lambda m, x: m.head(x)[:, -1])))
    (report,) = apply(graph, [GatherOutputRows()])
    assert report.matched == 0
    assert report.declined == ["the output is not one tensor of logits [B, S, V]"]
    assert find_input(graph, "output_rows") is None
