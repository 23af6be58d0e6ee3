"""Each rule of the graph's spec catches what it forbids, in its stages and not in others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule

from ad_core.api import Stage
from ad_core.api.errors import GraphInvalidError
from ad_core.graph.edit import find_input, insert_call, new_input, output_node, set_tensor
from ad_core.graph.ops import define_op
from ad_core.graph.verify import RULES, verify_graph, violations

from ..exported import Small, cleaned, export

aten = torch.ops.aten
pooled = define_op(
    "ad_testgraph::pooled(Tensor(a!) pool, Tensor x) -> Tensor", lambda pool, x: x.clone(), lambda pool, x: torch.empty_like(x)
)


def logits(graph: GraphModule) -> torch.fx.Node:
    return output_node(graph.graph).args[0][0]


def after_logits(graph: GraphModule, op: object, *args: object) -> torch.fx.Node:
    return insert_call(output_node(graph.graph), op, *args)


def wrong_order(graph: GraphModule) -> None:
    node = logits(graph)
    node.prepend(after_logits(graph, aten.relu.default, node))
    next(iter(graph.graph.nodes)).prepend(node)


def a_module_call(graph: GraphModule) -> None:
    graph.add_module("relu", torch.nn.ReLU())
    with graph.graph.inserting_before(output_node(graph.graph)):
        graph.graph.call_module("relu", (logits(graph),)).meta["val"] = logits(graph).meta["val"]


def a_python_function(graph: GraphModule) -> None:
    after_logits(graph, aten.relu.default, logits(graph)).target = torch.nn.functional.relu


def a_strange_function(graph: GraphModule) -> None:
    after_logits(graph, aten.relu.default, logits(graph)).target = max


def a_missing_weight(graph: GraphModule) -> None:
    next(node for node in graph.graph.nodes if node.op == "get_attr").target = "not.there"


def a_weight_of_another_shape(graph: GraphModule) -> None:
    set_tensor(graph, "head.bias", torch.zeros(5))


def no_value(graph: GraphModule) -> None:
    del logits(graph).meta["val"]


def a_mask_input(graph: GraphModule) -> None:
    new_input(graph, "attention_mask", find_input(graph, "input_ids").meta["val"])


def floating_ids(graph: GraphModule) -> None:
    node = find_input(graph, "input_ids")
    node.meta["val"] = node.meta["val"].float()


def two_outputs(graph: GraphModule) -> None:
    output_node(graph.graph).args = ((logits(graph), logits(graph)),)


def last_logits_only(graph: GraphModule) -> None:
    output_node(graph.graph).args = ((after_logits(graph, aten.select.int, logits(graph), 1, -1),),)


def an_assertion(graph: GraphModule) -> None:
    after_logits(graph, aten._assert_async.msg, after_logits(graph, aten.any.default, logits(graph)), "no")


def a_write(graph: GraphModule) -> None:
    after_logits(graph, aten.relu_.default, logits(graph))


def a_meta_constant(graph: GraphModule) -> None:
    with graph.graph.inserting_before(output_node(graph.graph)):
        graph.graph.call_function(aten.zeros.default, ([2],), {"device": torch.device("meta")}).meta["val"] = torch.zeros(2)


def a_meta_weight(graph: GraphModule) -> None:
    set_tensor(graph, "head.bias", torch.zeros(96, device="meta"))


def a_write_to_a_copy(graph: GraphModule) -> None:
    after_logits(graph, pooled, after_logits(graph, aten.clone.default, logits(graph)), logits(graph))


BREAKS: dict[str, list[tuple[Callable[[GraphModule], None], Stage]]] = {
    "well formed": [(wrong_order, Stage.CAPTURE)],
    "kinds": [(a_module_call, Stage.CAPTURE)],
    "targets": [(a_python_function, Stage.CAPTURE), (a_strange_function, Stage.CAPTURE)],
    "attributes": [(a_missing_weight, Stage.CAPTURE), (a_weight_of_another_shape, Stage.COMPILE)],
    "values": [(no_value, Stage.CLEAN)],
    "inputs": [(a_mask_input, Stage.CAPTURE), (floating_ids, Stage.FUSE)],
    "output": [(two_outputs, Stage.CAPTURE), (last_logits_only, Stage.FUSE)],
    "no checks": [(an_assertion, Stage.CLEAN)],
    "functional": [(a_write, Stage.MATCH)],
    "real devices": [(a_meta_constant, Stage.LOAD), (a_meta_weight, Stage.LOAD)],
    "pools only": [(a_write_to_a_copy, Stage.CACHE)],
}


@pytest.fixture
def graph() -> GraphModule:
    return cleaned(export(Small()))


def test_every_rule_is_tested() -> None:
    assert BREAKS.keys() == {rule.name for rule in RULES}


@pytest.mark.parametrize(("rule", "breaks", "stage"), [(rule, *case) for rule, cases in BREAKS.items() for case in cases])
def test_a_rule_catches_what_it_forbids(graph: GraphModule, rule: str, breaks: Callable[[GraphModule], None], stage: Stage) -> None:
    assert violations(graph, stage) == []
    breaks(graph)
    assert rule in {entry.rule for entry in violations(graph, stage)}


@pytest.mark.parametrize(
    ("breaks", "stage"),
    [
        (an_assertion, Stage.CAPTURE),
        (a_write, Stage.CAPTURE),
        (a_meta_weight, Stage.MATCH),
        (last_logits_only, Stage.CACHE),
        (a_mask_input, Stage.CACHE),
    ],
)
def test_a_rule_is_silent_outside_of_its_stages(graph: GraphModule, breaks: Callable[[GraphModule], None], stage: Stage) -> None:
    breaks(graph)
    assert violations(graph, stage) == []


def test_a_rule_that_a_stage_brings_about_holds_only_once_the_stage_is_done(graph: GraphModule) -> None:
    an_assertion(graph)
    assert violations(graph, Stage.CLEAN, complete=False) == []
    assert violations(graph, Stage.CLEAN)


def test_a_pool_may_be_written(graph: GraphModule) -> None:
    pool = new_input(graph, "pool", find_input(graph, "input_ids").meta["val"])
    after_logits(graph, pooled, pool, logits(graph))
    assert violations(graph, Stage.CACHE) == []


def test_the_error_names_the_pass_and_every_place(graph: GraphModule) -> None:
    a_write(graph)
    an_assertion(graph)
    with pytest.raises(GraphInvalidError) as caught:
        verify_graph(graph, Stage.FUSE, after="toy.pass")
    assert "after the pass toy.pass" in str(caught.value)
    assert "relu_" in str(caught.value)
    assert "[no checks]" in str(caught.value)


def test_an_export_is_valid_before_it_is_cleaned() -> None:
    assert violations(export(Small()), Stage.CAPTURE) == []
