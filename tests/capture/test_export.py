"""The exported graph: its form, that it is the module, and that repeated layers are only traced once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.fx.graph import CodeGen

from ad_core.api.errors import CaptureError
from ad_core.capture import export_module

from . import models


def lines(graph):
    """What a graph computes, node by node: op, arguments, module, dtype; weights by name."""
    place = {}
    for node in graph.graph.nodes:
        place[node] = f"@{node.target}" if node.op == "get_attr" else f"%{sum(1 for name in place.values() if name[0] == '%')}"
    result = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue
        arguments = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda value: place[value] if isinstance(value, torch.fx.Node) else value
        )
        stack = list((node.meta.get("nn_module_stack") or {}).values())[-1:]
        value = node.meta.get("val")
        result.append((node.op, str(node.target), str(arguments), stack, getattr(value, "dtype", None)))
    return result


@pytest.mark.parametrize(("kind", "distinct"), [("gemma2", 2), ("mixtral", 1)])
def test_a_graph_whose_layers_were_copied_is_the_graph_of_tracing_every_layer(kind, distinct):
    model = models.build(kind)
    copied, plain = export_module(model), export_module(model, repeats=False)
    assert copied.copied == copied.blocks - distinct
    assert plain.copied == 0
    assert lines(copied.graph) == lines(plain.graph)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_the_graph_computes_what_the_module_computes_at_other_shapes(kind):
    model = models.build(kind)
    graph = export_module(model, max_length=64).graph
    for shape in [(1, 1), (3, 21), (1, 40)]:
        ids = models.prompt(*shape)
        with torch.no_grad():
            torch.testing.assert_close(models.run(graph, ids), model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_the_graph_is_flat_with_named_inputs_and_the_modules_own_weights(toy):
    graph = export_module(toy).graph
    kinds = Counter(node.op for node in graph.graph.nodes)
    assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["input_ids", "position_ids"]
    assert kinds["call_module"] == 0
    assert kinds["output"] == 1
    assert type(graph.graph._codegen) is CodeGen
    assert not graph._forward_pre_hooks
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            assert graph.get_parameter(node.target) is toy.get_parameter(node.target)
        if node.op == "call_function":
            assert isinstance(node.meta["val"], torch.Tensor)
            assert "_assert" not in str(node.target)


def test_nodes_say_which_part_of_the_module_they_come_from(toy):
    graph = export_module(toy).graph
    tanh = [node for node in graph.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert [list(node.meta["nn_module_stack"].values())[-1][0] for node in tanh] == [f"layers.{index}" for index in range(4)]
    assert all("return x + torch.tanh" in node.meta["stack_trace"] for node in tanh)
    linear = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert list(linear[2].meta["nn_module_stack"]) == ["", "layers.2", "layers.2.inner"]


def test_tied_weights_are_one_node_under_their_first_name():
    graph = export_module(models.build("llama")).graph
    tables = [node.target for node in graph.graph.nodes if node.op == "get_attr" and ("embed" in node.target or "head" in node.target)]
    assert tables == ["model.embed_tokens.weight"]


def test_the_batch_and_the_length_are_symbols(toy):
    graph = export_module(toy).graph
    value = next(node for node in graph.graph.nodes if node.op == "placeholder").meta["val"]
    assert all(isinstance(size, torch.SymInt) for size in value.shape)
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0].meta["val"]
    assert output.shape[0] == value.shape[0]
    assert output.shape[1] == value.shape[1]
    assert output.shape[2] == 48


class Remembers(models.Toy):
    """Changes itself while it runs: keeps a tensor, counts, fills a cache."""

    def __init__(self):
        super().__init__()
        self.cache, self.count = {}, 0

    def forward(self, input_ids, position_ids=None):
        self.count += 1
        self.cache["last"] = self.embed(input_ids)
        self.seen = self.cache["last"]
        return super().forward(input_ids)


def test_a_module_in_memory_is_left_as_it_was():
    module = Remembers().train()
    module.layers[1].eval()
    hook = module.register_forward_hook(lambda *_: None)
    before = dict(module.named_parameters())
    modes = [part.training for part in module.modules()]
    attributes = [set(vars(part)) for part in module.modules()]
    values = {name: tensor.clone() for name, tensor in before.items()}
    export_module(module)
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == {name: id(tensor) for name, tensor in before.items()}
    assert all(torch.equal(tensor, values[name]) and tensor.requires_grad for name, tensor in before.items())
    assert [part.training for part in module.modules()] == modes
    assert [set(vars(part)) for part in module.modules()] == attributes
    assert (module.cache, module.count) == ({}, 0)
    assert list(module._forward_hooks) == [hook.id]


def test_a_module_is_left_as_it_was_when_its_export_raises():
    class Fails(models.Toy):
        def forward(self, input_ids, position_ids=None):
            self.seen = self.embed(input_ids)
            if int(self.seen.sum()) > 0:
                return self.seen
            return super().forward(input_ids)

    module = Fails().train()
    before = list(module.parameters())
    with pytest.raises(Exception, match=r".+"):
        export_module(module)
    assert all(now is then for now, then in zip(module.parameters(), before, strict=True))
    assert module.training
    assert not hasattr(module, "seen")
    assert "forward" not in vars(module.layers[0])


def test_dropout_of_a_module_in_training_is_not_in_the_graph():
    class Drops(models.Toy):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids) * torch.nn.functional.dropout(torch.ones(1), 0.5, self.training)

    module = Drops().train()
    graph = export_module(module).graph
    ids = models.prompt(1, 5) % 48
    module.eval()
    torch.testing.assert_close(models.run(graph, ids), module(ids))


def test_a_forward_that_writes_to_a_buffer_is_refused():
    class Writes(models.Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(()))

        def forward(self, input_ids, position_ids=None):
            self.total.add_(1)
            return super().forward(input_ids)

    with pytest.raises(CaptureError, match=r"writes to what it keeps: total"):
        export_module(Writes())


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self: None, "takes no token ids"),
        (lambda self, input_ids, mask: None, "needs more than token ids: mask"),
        (lambda self, input_ids: self.embed(input_ids)[0], r"returned no logits but a tensor of shape"),
        (lambda self, input_ids: {"scores": 1}, "returned no logits but a dict"),
    ],
)
def test_a_forward_that_cannot_be_called_is_refused(forward, message):
    module = type("Odd", (models.Toy,), {"forward": forward})()
    with pytest.raises(CaptureError, match=message):
        export_module(module)


def test_any_name_of_the_first_argument_and_any_form_of_the_result_will_do():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    for wrap in (lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, Output):
        module = type(
            "Other", (models.Toy,), {"forward": lambda self, tokens, wrap=None, make=wrap: make(models.Toy.forward(self, tokens))}
        )()
        graph = export_module(module).graph
        assert [node.target for node in graph.graph.nodes if node.op == "placeholder"] == ["input_ids"]
        ids = models.prompt(2, 7) % 48
        torch.testing.assert_close(models.run(graph, ids), models.Toy.forward(module, ids))


def test_a_module_on_meta_gives_the_same_graph_with_constants_on_the_device_of_the_run():
    class Scales(models.Toy):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids) * torch.tensor(3.0, device=input_ids.device) + torch.arange(2, device=input_ids.device)[1]

    real = Scales()
    with torch.device("meta"):
        empty = Scales()
    graph = export_module(empty).graph
    assert all(tensor.is_meta for tensor in graph.parameters())
    graph.load_state_dict(real.state_dict(), strict=False, assign=True)
    ids = models.prompt(2, 6) % 48
    torch.testing.assert_close(models.run(graph, ids), real(ids))


def test_constants_lie_on_the_device_of_the_run_whether_it_is_here_or_not():
    class Counts(models.Toy):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids) + torch.arange(48, device=input_ids.device)

    graph = export_module(Counts(), device="cuda").graph
    arange = next(node for node in graph.graph.nodes if "arange" in str(node.target))
    assert arange.kwargs["device"].type == "cuda"
    assert {node.meta["val"].device.type for node in graph.graph.nodes if "val" in node.meta} == {"cuda"}


class Rotates(models.Toy):
    """Switches autocast off for a part, as rotary tables do; or on."""

    def __init__(self, enabled=False):
        super().__init__()
        self.enabled = enabled

    def forward(self, input_ids, position_ids=None):
        x = self.embed(input_ids)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            a, b = x @ x.new_ones(16, 16), x * 2
            for layer in self.layers:
                a = layer(a)
        return self.head(a + b)


def test_a_region_without_autocast_is_part_of_the_graph_and_one_with_it_is_refused():
    module = Rotates()
    exported = export_module(module)
    assert exported.copied == 3
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in exported.graph.graph.nodes)
    ids = models.prompt(2, 5) % 48
    torch.testing.assert_close(models.run(exported.graph, ids), module(ids))
    with pytest.raises(CaptureError, match=r"in autocast to torch\.bfloat16"):
        export_module(Rotates(enabled=True))


def test_what_a_forward_remembers_of_one_run_is_not_in_the_next():
    class Caches(models.Toy):
        def forward(self, input_ids, position_ids=None):
            if not hasattr(self, "table"):
                self.table = torch.arange(input_ids.shape[1]).sin()
            return super().forward(input_ids) * self.table[None, :, None]

    module = Caches()
    graph = export_module(module).graph
    ids = models.prompt(2, 5) % 48
    torch.testing.assert_close(models.run(graph, ids), models.Toy.forward(module, ids) * torch.arange(5).sin()[None, :, None])
    assert not hasattr(module, "table")


def test_an_export_that_fails_raises_what_the_forward_raised_and_prints_no_graph(capfd):
    class Branches(models.Toy):
        def forward(self, input_ids, position_ids=None):
            logits = super().forward(input_ids)
            return logits if logits.sum() > 0 else -logits

    with pytest.raises(RuntimeError, match="data-dependent"):
        export_module(Branches())
    assert "def forward" not in "".join(capfd.readouterr())
