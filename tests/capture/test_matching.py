"""Between matchers: who owns a place, what is written there, and when nobody can say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.api import Declined, Matcher, Proposal
from ad_core.api.errors import CaptureError
from ad_core.capture import apply_matchers, export_module
from ad_core.graph.ops import define_op
from ad_core.plan import Plan
from ad_core.registry.records import Offer

from .models import run

define_op(
    "capture_tests::affine(Tensor x, Tensor weight, *, float shift=0.0, bool twice=False) -> Tensor",
    lambda x, weight, *, shift=0.0, twice=False: (2 if twice else 1) * x @ weight.T + shift,
    lambda x, weight, *, shift=0.0, twice=False: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
define_op(
    "capture_tests::other(Tensor x, Tensor weight) -> Tensor",
    lambda x, weight: x @ weight.T,
    lambda x, weight: x.new_empty(*x.shape[:-1], 24),
)
OP = torch.ops.capture_tests.affine.default


class Model(nn.Module):
    """logits = linear(embed(ids)) + 1.5, twice"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 24)
        self.first, self.second = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, input_ids):
        return self.second(self.first(self.embed(input_ids)) + 1.5) + 1.5


def make(name, *, shift=True, priority=0, produces="capture_tests::affine", extra=None, **parts):
    """A matcher of linear (and the sum after it)."""

    class Finds(Matcher):
        def find(self, graph):
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.linear.default:
                    add = next(iter(node.users))
                    nodes = {node, add} if shift else {node}
                    arguments = {"x": node.args[0], "weight": node.args[1], **({"shift": 1.5} if shift else {}), **(extra or {})}
                    yield Proposal(output=add if shift else node, nodes=frozenset(nodes), arguments=arguments, **parts)

    matcher = Finds()
    matcher.name, matcher.produces, matcher.priority = name, produces, priority
    return matcher


def applied(*matchers, distributions=None):
    """The graph after the matchers, which must still compute the module, what matched, and the plan."""
    module = Model().eval()
    graph, plan = export_module(module).graph, Plan()
    distributions = distributions or ["dist-a"] * len(matchers)
    offers = [Offer(matcher, "tests", distribution) for matcher, distribution in zip(matchers, distributions, strict=True)]
    matched = apply_matchers(graph, offers, plan)
    ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(run(graph, ids), module(ids))
    return graph, matched, plan


def test_a_match_becomes_one_op_with_its_arguments_where_the_schema_has_them():
    graph, matched, plan = applied(make("linear"))
    nodes = [node for node in graph.graph.nodes if node.target is OP]
    assert [matched.claims[node] for node in nodes] == ["linear", "linear"]
    assert len(nodes[0].args) == 2
    assert nodes[0].kwargs == {"shift": 1.5}
    assert nodes[0].meta["val"].shape[2] == 24
    assert [list(node.meta["nn_module_stack"])[-1] for node in nodes] == ["", ""]
    assert torch.ops.aten.linear.default not in {node.target for node in graph.graph.nodes}
    assert plan.decisions == []


def test_the_match_that_covers_more_wins_then_priority_then_the_name():
    for matchers, winner, reason in [
        ([make("small", shift=False, priority=9), make("large")], "large", "large covers 2 nodes, this 1"),
        ([make("a"), make("b", priority=1)], "b", "b has priority 1, this 0"),
        ([make("b"), make("a")], "a", "equal to a, which comes first by name"),
    ]:
        _, matched, plan = applied(*matchers)
        assert set(matched.claims.values()) == {winner}
        assert [decision.winner for decision in plan.decisions] == [winner, winner]
        assert [reason in text for decision in plan.decisions for text in decision.losers.values()] == [True, True]


def test_equal_matches_of_two_distributions_with_different_results_are_an_error():
    same = [make("a"), make("b")]
    _, matched, _ = applied(*same, distributions=["dist-a", "dist-b"])
    assert set(matched.claims.values()) == {"a"}
    different = [make("a"), make("b", extra={"twice": False})]
    with pytest.raises(CaptureError, match=r"(?s)a \(dist-a\) makes it .* b \(dist-b\) .*AD_DISABLE_PLUGINS=dist-b"):
        applied(*different, distributions=["dist-a", "dist-b"])
    applied(*different, distributions=["dist-a", "dist-a"])


def test_new_nodes_before_and_after_the_op_have_their_metas():
    aten = torch.ops.aten

    def prepare(graph):
        output = next(
            node
            for node in graph.graph.nodes
            if node.target is aten.add.Tensor and aten.linear.default in {p.target for p in node.all_input_nodes}
        )
        linear = output.args[0]
        return {"x": graph.graph.call_function(aten.mul.Tensor, (linear.args[0], 1.0))}

    def rewrite(graph, node):
        return graph.graph.call_function(aten.mul.Tensor, (node, 1.0))

    class Once(Matcher):
        name, produces = "once", "capture_tests::affine"

        def find(self, graph):
            yield next(iter(make("x", prepare=prepare, rewrite=rewrite).find(graph)))

    graph, _, _ = applied(Once())
    made = [node for node in graph.graph.nodes if node.target is aten.mul.Tensor]
    assert len(made) == 2
    assert all(isinstance(node.meta["val"], torch.Tensor) and "nn_module_stack" in node.meta for node in made)


def test_a_matcher_that_declines_is_quoted_and_one_that_misuses_the_op_is_an_error():
    class Declines(Matcher):
        name, produces = "shy", "capture_tests::affine"

        def find(self, graph):
            yield Declined("the mask is odd")

    _, matched, _ = applied(Declines())
    assert matched.declined == ["shy: the mask is odd"]
    with pytest.raises(CaptureError, match="does not take: turns"):
        applied(make("old", extra={"turns": 3}))
    with pytest.raises(CaptureError, match="needs and does not get: weight"):
        applied(type("Short", (Matcher,), {"name": "short", "produces": "capture_tests::affine", "find": _without_weight})())
    with pytest.raises(CaptureError, match="replaces a value by one of another form"):
        applied(make("flat", rewrite=lambda graph, node: graph.graph.call_function(torch.ops.aten.flatten.using_ints, (node, 0))))


def _without_weight(self, graph):
    for proposal in make("linear").find(graph):
        yield Proposal(output=proposal.output, nodes=proposal.nodes, arguments={"x": proposal.arguments["x"]})
