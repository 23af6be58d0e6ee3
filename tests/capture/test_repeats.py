"""Which layers may be copied: only those that do exactly the same, seen by running them once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ad_core.capture import export_module

from .models import Block, Toy, run


def exported(module, *, copied: int):
    """The module's graph, after checking how many layers were copied and that it still computes the module."""
    result = export_module(module.eval())
    assert result.copied == copied, result.note
    ids = torch.randint(0, 48, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(result.graph, ids), module(ids))
    return result


def test_equal_layers_are_copied_with_their_own_weights():
    exported(Toy(blocks=5), copied=4)


def test_layers_that_differ_in_a_number_are_each_traced():
    module = Toy(blocks=4)
    module.layers[1].scale = 2.0
    module.layers[3].scale = 2.0
    exported(module, copied=2)


class Clipped(Block):
    """Fades once the text is longer than its window."""

    def __init__(self, window: int, place: int = 0):
        super().__init__(16)
        self.window, self.place = window, place

    def forward(self, x):
        return super().forward(x) * (torch.sym_min(self.window, x.shape[1]) / x.shape[1])


def test_numbers_that_make_no_difference_to_a_short_text_make_one_all_the_same():
    module = Toy(blocks=2)
    module.layers = nn.ModuleList(Clipped(window) for window in (100, 200, 100, 200))
    assert exported(module, copied=2).blocks == 4


def test_the_place_of_a_layer_in_its_list_is_no_difference():
    module = Toy(blocks=2)
    module.layers = nn.ModuleList(Clipped(100, place) for place in range(5, 9))
    exported(module, copied=3)
    module.layers[2].place = 20
    exported(module, copied=2)


def test_layers_of_other_shapes_and_classes_are_each_traced():
    class Other(Block):
        def forward(self, x):
            return x - torch.sigmoid(self.inner(x))

    module = Toy(blocks=2)
    module.layers.append(Other(16))
    module.layers.append(Block(16))
    module.layers[-1].inner = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    exported(module, copied=1)


def test_a_layer_that_is_called_again_and_again_is_traced_once():
    class Loops(Toy):
        def forward(self, input_ids, position_ids=None):
            x = self.embed(input_ids)
            for _ in range(3):
                for layer in self.layers:
                    x = layer(x)
            return self.head(x)

    exported(Loops(blocks=2), copied=5)


def test_shared_weights_of_two_layers_stay_shared():
    module = Toy(blocks=3)
    module.layers[2].inner = module.layers[0].inner
    graph = exported(module, copied=1).graph
    assert {node.target for node in graph.graph.nodes if node.op == "get_attr" and "weight" in node.target and "layers" in node.target} == {
        "layers.0.inner.weight",
        "layers.1.inner.weight",
    }
    module.layers[2].inner = nn.Linear(16, 16)
    module.layers[2].inner.weight = module.layers[1].inner.weight
    exported(module, copied=1)


class Passes(Toy):
    """Layers that hand on something besides their hidden state."""

    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))

    def forward(self, input_ids, position_ids=None):
        x, shared = self.embed(input_ids), {}
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, total = layer(x, total, shared=shared)
        return self.head(x + total + shared.get("kept", 0))


class Sums(Block):
    def __init__(self):
        super().__init__(16)

    def forward(self, x, total, *, shared):
        return super().forward(x), total + x


class HandsBack(Sums):
    def forward(self, x, total, *, shared):
        return Block.forward(self, x), total


class Leaks(Sums):
    def forward(self, x, total, *, shared):
        shared["kept"] = Block.forward(self, x) * 2
        return Block.forward(self, x), total


class WritesToItsInput(Sums):
    def forward(self, x, total, *, shared):
        total += x
        return Block.forward(self, x), total


class WritesToItsOwn(Sums):
    def forward(self, x, total, *, shared):
        y = x * 2
        y.add_(1)
        return Block.forward(self, y), total + y


@pytest.mark.parametrize(("block", "copied"), [(Sums, 2), (HandsBack, 2), (Leaks, 0), (WritesToItsInput, 0), (WritesToItsOwn, 2)])
def test_what_a_layer_may_do_besides_returning(block, copied):
    exported(Passes(block), copied=copied)


def test_layers_that_read_different_tensors_from_outside_are_each_traced():
    class Looks(Toy):
        def forward(self, input_ids, position_ids=None):
            x = self.embed(input_ids)
            for index, layer in enumerate(self.layers):
                layer.bias = self.head.bias[index]
                x = layer(x) + layer.bias
            return self.head(x)

    class Biased(Block):
        def forward(self, x):
            return super().forward(x) + self.bias

    module = Looks(blocks=2)
    module.layers = nn.ModuleList([Biased(16), Biased(16)])
    exported(module, copied=0)


def test_a_module_that_does_not_run_on_fixed_shapes_is_traced_layer_by_layer():
    class Asks(Toy):
        def forward(self, input_ids, position_ids=None):
            if not torch.compiler.is_exporting() or isinstance(input_ids.shape[0], int):
                torch.ones(1).item() if not torch._C._len_torch_dispatch_stack() else int(input_ids[0, 0])
            return super().forward(input_ids)

    result = export_module(Asks().eval())
    assert result.copied == 0
    assert "the rehearsal raised" in result.note


def test_an_export_that_leaves_the_rehearsal_is_done_again_without_copies():
    class Wavers(Toy):
        runs = 0

        def forward(self, input_ids, position_ids=None):
            Wavers.runs += 1
            x = self.embed(input_ids)
            for layer in self.layers if Wavers.runs == 1 else list(self.layers)[::-1]:
                x = layer(x)
            return self.head(x)

    result = export_module(Wavers(blocks=3).eval())
    assert result.copied == 0
    assert "the export called layers.2" in result.note
