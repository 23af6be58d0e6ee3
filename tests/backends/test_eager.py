"""The eager backend gives what the graph gives, bit for bit."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import fx, nn

from ad_core.backends import eager
from ad_core.backends.eager import EagerBackend


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        low, high = self.up(x).split(8, -1)
        gate = torch.clamp(low, -float("inf"), 3.0) * high[:, 1:].sum()
        return self.down(torch.cat([gate, low], -1)), x.shape[0]


def exported(module: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    dims = {0: torch.export.Dim.AUTO}
    return torch.export.export(module, inputs, dynamic_shapes=(dims,), strict=False).module()


def test_results_equal_the_graph_module_at_another_shape():
    torch.manual_seed(0)
    graph = exported(Block(), torch.randn(4, 8))
    graph.graph.set_codegen(fx.graph.CodeGen())
    for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
        graph.graph.erase_node(node)
    graph = fx.GraphModule(graph, graph.graph)
    x = torch.randn(7, 8)
    want, got = graph(x), EagerBackend().compile(graph)(x)
    assert torch.equal(want[0], got[0])
    assert want[1] == got[1] == 7


def test_values_are_freed_after_their_last_use():
    alive: list[int] = []
    references: list[weakref.ref] = []

    def make(x):
        y = x + 1
        references.append(weakref.ref(y))
        return y

    def count(x):
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        return x * 2

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(make, (x,))
    second = graph.call_function(count, (first,))
    third = graph.call_function(count, (second,))
    graph.output(third)
    EagerBackend().compile(fx.GraphModule({}, graph))(torch.ones(2))
    assert alive == [1, 0]


def test_weights_are_read_from_the_graph_and_not_copied():
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, weight)))
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(3))
    graph_module = fx.GraphModule(module, graph)
    call = EagerBackend().compile(graph_module)
    graph_module.weight.data.fill_(5.0)
    assert call(torch.ones(3)).tolist() == [5.0] * 3


class Everyday(nn.Module):
    """Every op that has a shorter way to be called, with the arguments that graphs have."""

    def forward(self, x):
        table = torch.arange(24.0, dtype=torch.float64).view(12, 2)
        rows = nn.functional.embedding((x.abs() * 3).long().clamp(max=11), table, padding_idx=0).sum((-1, -2), True, dtype=torch.float32)
        y = torch.add(x, x, alpha=2) - 0.5 * x.neg() / 3 + (x + 1.5).pow(2).mean([-1], True).rsqrt() * x.exp().sqrt()
        y = torch.where(y > 0.2, y.sin(), torch.div(y.cos(), 0.1, rounding_mode="floor")) + rows.mean(-1)[:, :, None].expand(
            -1, -1, 8
        ).mean(1)
        a, b = torch.cat([y, y.tanh()], -1).split([10, 6], -1)
        scores = torch.bmm(a[:, None].sigmoid().permute(0, 2, 1), b.unsqueeze(1)).transpose(1, 2).softmax(-1, dtype=torch.float64)
        return scores.to(torch.float32, copy=True) @ a.reshape(-1, 10, 1), scores.select(1, 2).sum(), torch.sub(y, 1).squeeze()


def test_every_shorter_call_gives_the_same_bits():
    torch.manual_seed(0)
    graph = exported(Everyday(), torch.randn(4, 8))
    graph.graph.set_codegen(fx.graph.CodeGen())
    for node in [node for node in graph.graph.nodes if node.op == "call_module"]:
        graph.graph.erase_node(node)
    graph = fx.GraphModule(graph, graph.graph)
    named = {
        node.target._schema.name.removeprefix("aten::") for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    }
    assert set(eager._FUNCTIONS) <= named
    assert set(eager._METHODS) <= {node.target for node in graph.graph.nodes}
    x = torch.randn(7, 8)
    for want, got in zip(graph(x), EagerBackend().compile(graph)(x), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(want, got)
