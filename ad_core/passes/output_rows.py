"""Computes logits for the tokens that are wanted only: a prompt of a thousand tokens needs the last one's."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ad_core.api.passes import Pass, PassContext, PassReport
from ad_core.api.types import Declined, Stage
from ad_core.graph.axes import TOKEN_INPUTS, Axis, Sizes, UnknownSize
from ad_core.graph.edit import find_input, insert_call, is_op, new_input, output_node, refresh_value
from ad_core.graph.token_rules import Call, judge

aten = torch.ops.aten

OUTPUT_ROWS = "output_rows"
"""The input with the wanted tokens, a batch field: [R] int64, indices into the packed tokens."""


class GatherOutputRows(Pass):
    """Logits [1, T, V] become [R, V]. It stands before the insertion pass, which takes the new input over as a batch field."""

    name = "core.output_rows"
    stage = Stage.CACHE
    before = ("core.insert_caches",)
    safety = "reordered"

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        gathered = gather_output_rows(graph)
        if isinstance(gathered, Declined):
            return PassReport(declined=[gathered.reason])
        return PassReport(matched=1, notes=[f"gathers rows of {gathered.name}: what follows is computed for {OUTPUT_ROWS} only"])


def gather_output_rows(graph: GraphModule, rows_node_name: str = OUTPUT_ROWS) -> Node | Declined:
    """Gathers the rows that the input `rows_node_name` [R] names, as far up as everything below treats each token by itself.

    The input is made if there is none. The output becomes [R, V]. It works before the insertion pass and after it. The batch must then
    be 1 (packed tokens). Returns the node whose rows are gathered.
    """
    output = output_node(graph.graph)
    result = output.args[0]
    logits = result[0] if isinstance(result, list | tuple) and len(result) == 1 else result
    if not isinstance(logits, Node) or not isinstance(logits.meta.get("val"), torch.Tensor) or logits.meta["val"].dim() != 3:
        return Declined("the output is not one tensor of logits [B, S, V]")
    source, below = _row_wise(logits, Sizes(graph))
    rows = _rows_input(graph, rows_node_name)
    reader = below[0] if below else output
    gathered = insert_call(reader, aten.index_select.default, source, 1, rows, like=reader if below else source)
    reader.replace_input_with(source, gathered)
    for node in below:
        refresh_value(node)
    flat = insert_call(output, aten.select.int, below[-1] if below else gathered, 0, 0, like=logits)
    output.args = (type(result)([flat]) if isinstance(result, list | tuple) else flat,)
    return source


def _row_wise(logits: Node, sizes: Sizes) -> tuple[Node, list[Node]]:
    """The node up to which one can walk from the logits, and the nodes passed, from top to bottom: each has one reader and one argument
    with tokens, at dim 1, and computes every token's row from that token's row alone."""
    below: list[Node] = []
    node = logits
    while len(node.users) == 1 and node.op == "call_function":
        operand = _one_operand(node, sizes)
        if operand is None or not _without_length(node, sizes):
            break
        below.insert(0, node)
        node = operand
    return node, below


def _one_operand(node: Node, sizes: Sizes) -> Node | None:
    try:
        call = Call(node, sizes)
        operands = [(name, parent) for name, parent in call.tensors() if sizes.length_dims(parent.meta.get("val"))]
        if len(operands) != 1 or sizes.length_dims(node.meta["val"]) != (1,):
            return None
        (name, parent) = operands[0]
        row_wise = sizes.length_dims(parent.meta["val"]) == (1,) and judge(call, name, parent, Axis(1)) == Axis(1)
    except UnknownSize:
        return None
    return parent if row_wise else None


def _without_length(node: Node, sizes: Sizes) -> bool:
    """Whether the number of tokens is no argument of the node. In a view's sizes it becomes -1, where that is still free."""
    lengths = [parent for parent in node.all_input_nodes if sizes.carries_length(parent.meta.get("val"))]
    if not lengths:
        return True
    shape = list(node.args[1]) if is_op(node, "aten::view", "aten::reshape") and isinstance(node.args[1], list | tuple) else []
    if len(lengths) > 1 or shape.count(lengths[0]) != 1 or -1 in shape or shape.index(lengths[0]) != 1:
        return False
    shape[1] = -1
    node.args = (node.args[0], shape)
    return True


def _rows_input(graph: GraphModule, name: str) -> Node:
    found = find_input(graph, name)
    if found is not None and found.meta.get("val") is not None:
        return found
    ids = next(node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder" and node.target in TOKEN_INPUTS)
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.zeros(5, dtype=torch.int64)
    value = ids.fake_mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name)).to(ids.device)
    if found is None:
        return new_input(graph, name, value)
    found.meta["val"] = value
    return found
