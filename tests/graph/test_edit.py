"""Small edits of graphs: weights by path, nodes with values, dead code."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ad_core.graph.edit import (
    delete_tensor,
    find_input,
    flat_module,
    free_name,
    insert_call,
    live_nodes,
    new_input,
    output_node,
    remove_dead_code,
    set_tensor,
    tensor_at,
    tensors_read,
)

from ..exported import Small, export, run, sample

aten = torch.ops.aten


def test_a_flat_module_takes_flat_inputs_and_gives_the_same() -> None:
    (ids,) = sample(2, 11, positions=False)
    model, length = Small(), torch.export.Dim("length", max=64)
    program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": {1: length}})
    flat = flat_module(program.module())
    assert [node.target for node in flat.graph.nodes if node.op == "placeholder"] == ["input_ids"]
    assert not [node for node in flat.graph.nodes if node.op == "call_module"]
    flat.graph.lint()
    with torch.no_grad():
        torch.testing.assert_close(flat(ids)[0], model(ids))


def test_tensors_are_set_read_and_let_go_by_path() -> None:
    graph = export(Small())
    assert set(tensors_read(graph)) == {"embedding.weight", "head.weight", "head.bias"}
    value = torch.zeros(3)
    set_tensor(graph, "new.room.value", value)
    assert tensor_at(graph, "new.room.value") is value
    set_tensor(graph, "head.bias", torch.full((96,), 2.0))
    assert tensor_at(graph, "head.bias")[0] == 2
    delete_tensor(graph, "new.room.value")
    delete_tensor(graph, "not.there")
    assert tensor_at(graph, "new.room.value") is None
    assert free_name(graph, "head") == "head_1"
    assert free_name(graph, "tail") == "tail"


def test_an_inserted_call_knows_its_value_and_where_it_comes_from() -> None:
    graph = export(Small())
    output = output_node(graph.graph)
    logits = output.args[0][0]
    node = insert_call(output, aten.mul.Tensor, logits, 2.0, like=logits)
    assert node.meta["val"].shape == logits.meta["val"].shape
    assert node.meta["nn_module_stack"] == logits.meta["nn_module_stack"]
    output.args = ((node,),)
    before = run(GraphModule(graph, graph.graph))
    graph.recompile()
    assert torch.equal(run(graph), before)


def test_dead_code_goes_and_what_writes_stays() -> None:
    graph = export(Small())
    output = output_node(graph.graph)
    dead = insert_call(output, aten.relu.default, output.args[0][0])
    insert_call(output, aten.neg.default, dead)
    kept = insert_call(output, aten.zeros.default, [2])
    insert_call(output, aten.add_.Tensor, kept, 1.0)
    assert remove_dead_code(graph) == 2
    assert kept not in live_nodes(graph.graph)
    assert kept in set(graph.graph.nodes)


def test_a_new_input_follows_the_others() -> None:
    graph = export(Small())
    node = new_input(graph, "positions", find_input(graph, "input_ids").meta["val"])
    assert find_input(graph, "positions") is node
    assert [each.target for each in graph.graph.nodes if each.op == "placeholder"] == ["input_ids", "positions"]
    assert find_input(graph, "nothing") is None
