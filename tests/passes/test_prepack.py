"""Packed linears compute the same, weights are packed where that pays, and the unpacked ones are really gone."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api import PassContext, PassReport
from ad_core.graph.edit import tensor_at
from ad_core.passes.packing import Native, OneDnn, packed_linear
from ad_core.passes.prepack import PrepackLinears

from ..exported import VOCABULARY, apply, cleaned, export, export_model, ops, run

PACKED = {"native": "ad_core.packed_linear.default", "oneDNN": "mkldnn._linear_pointwise.default"}
LAYOUTS = {layout.name: layout for layout in (Native(), OneDnn())}


def packs(dtype: torch.dtype, layout: str = "oneDNN") -> bool:
    return LAYOUTS[layout].why_not(torch.zeros(16, 16, dtype=dtype)) is None


needs_bfloat16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="this CPU packs no bfloat16")


@pytest.fixture(params=PACKED)
def layout(request: pytest.FixtureRequest) -> str:
    if not packs(torch.bfloat16, request.param):
        pytest.skip(f"no {request.param} layout for bfloat16 here: {LAYOUTS[request.param].why_not(torch.zeros(16, 16).bfloat16())}")
    return str(request.param)


class Net(nn.Module):
    def __init__(self, tied: bool = False, width: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up = nn.Embedding(VOCABULARY, width), nn.Linear(width, 40)
        self.down, self.head = nn.Linear(40, width, bias=False), nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.down(self.up(x).relu()))


def graph_of(model: nn.Module) -> GraphModule:
    """The model's graph, which alone holds the weights."""
    graph = cleaned(export(model))
    del model
    gc.collect()
    return graph


def pack(graph: GraphModule, **options: object) -> PassReport:
    report = PrepackLinears().run(graph, PassContext(torch.device("cpu"), None, options))
    graph.graph.lint()
    graph.recompile()
    return report


@needs_bfloat16
@pytest.mark.parametrize("shape", [(1, 1), (2, 11), (1, 64)])
def test_packed_linears_compute_the_same(shape: tuple[int, int], layout: str) -> None:
    graph = graph_of(Net().bfloat16())
    wanted = run(graph, *shape)
    report = pack(graph, layouts=[layout])
    assert (report.matched, report.declined) == (3, [])
    assert ops(graph).count(PACKED[layout]) == 3
    assert not any("aten.linear" in op for op in ops(graph))
    torch.testing.assert_close(run(graph, *shape), wanted, rtol=2e-2, atol=2e-2)


@needs_bfloat16
def test_the_unpacked_weights_are_let_go(layout: str) -> None:
    graph = graph_of(Net().bfloat16())
    storages = [weakref.ref(tensor_at(graph, path)) for path in ("up.weight", "down.weight", "head.weight")]
    kept = weakref.ref(tensor_at(graph, "embedding.weight"))
    report = pack(graph, layouts=[layout])
    assert [storage() for storage in storages] == [None] * 3
    assert kept() is not None
    assert not any(name.endswith(("up.weight", "down.weight", "head.weight")) for name in graph.state_dict())
    assert report.notes == [f"3 weights in the layout {layout}"]


@needs_bfloat16
def test_weights_that_a_module_lent_stay_and_that_is_said(layout: str) -> None:
    model = Net().bfloat16()
    before = model.up.weight.clone()
    graph = cleaned(export(model))
    report = pack(graph, layouts=[layout])
    assert torch.equal(model.up.weight, before)
    assert "held outside the graph" in report.notes[1]


@needs_bfloat16
def test_a_tied_embedding_is_packed_within_the_budget_only() -> None:
    graph = graph_of(Net(tied=True).bfloat16())
    wanted = run(graph)
    report = pack(graph, layouts=["oneDNN"])
    assert report.matched == 3
    assert "are there twice" in report.notes[1]
    torch.testing.assert_close(run(graph), wanted, rtol=2e-2, atol=2e-2)

    graph = graph_of(Net(tied=True).bfloat16())
    report = pack(graph, duplicate_bytes=100, layouts=["oneDNN"])
    assert report.matched == 2
    assert "1 weight: is also read by embedding" in report.declined[0]
    assert torch.equal(run(graph), wanted) or torch.allclose(run(graph), wanted, rtol=2e-2, atol=2e-2)


@needs_bfloat16
def test_one_weight_of_two_linears_is_packed_once(layout: str) -> None:
    class Shared(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.head(self.down(self.up(x)) + self.down(self.up(x * 2)))

    graph = graph_of(Shared().bfloat16())
    report = pack(graph, layouts=[layout])
    assert report.matched == 5
    assert sum(name.endswith("_packed") for name in graph.state_dict()) == 3
    assert report.notes == [f"3 weights in the layout {layout}"]


def test_float32_is_packed_on_request_only() -> None:
    graph = graph_of(Net())
    wanted = run(graph)
    report = pack(graph)
    assert report.matched == 0
    assert report.declined[0].startswith("3 weights: is float32")
    assert pack(graph, float32=True).matched == 3
    torch.testing.assert_close(run(graph), wanted)


@pytest.mark.skipif(packs(torch.float16), reason="this CPU packs float16")
def test_a_dtype_that_the_cpu_cannot_pack_is_declined_with_its_reason() -> None:
    report = pack(graph_of(Net().half()))
    assert report.matched == 0
    assert "torch.float16 is not packed on this CPU" in report.declined[0]


def test_another_device_is_declined() -> None:
    graph = graph_of(Net())
    (report,) = apply(graph, [PrepackLinears()], device="cuda")
    assert report.matched == 0
    assert "the model runs on cuda" in report.declined[0]


@needs_bfloat16
def test_a_whole_model_is_packed() -> None:
    graph = cleaned(export_model("llama", dtype=torch.bfloat16))
    wanted = run(graph).float()
    assert pack(graph).matched == 2 * 7 + 1
    logits = run(graph).float()
    assert (logits - wanted).square().mean().sqrt() < 2e-2 * wanted.square().mean().sqrt()


MEMORY = """
import gc, sys
import torch
from torch import nn
from tests.exported import cleaned, export
from ad_core.api import PassContext
from ad_core.passes.prepack import PrepackLinears

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(96, 1024)
        widths = [(1024, 8192), (8192, 1024)] * 8
        self.layers = nn.ModuleList(nn.Linear(*width, bias=False) for width in widths)
        self.head = nn.Linear(1024, 96)
    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

graph = cleaned(export(Deep().bfloat16()))  # 16 weights of 16 MiB
torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16), None)
gc.collect()
before = resident("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
report = PrepackLinears().run(graph, PassContext(torch.device("cpu"), None))
gc.collect()
print(report.matched, before, resident("VmHWM:"), resident("VmRSS:"))
"""


@pytest.mark.slow
@needs_bfloat16
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_the_peak_is_one_weight_above_what_was_there() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    matched, before, peak, after = (float(number) for number in done.stdout.split())
    assert matched == 17
    assert peak - before < 64  # of 256 MiB that were packed; one is 16
    assert after - before < 32


class Branches(nn.Module):
    """Three linears of one input, with and without biases, whose results are viewed as if they were contiguous."""

    def __init__(self, biases: tuple[bool, bool, bool]):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.parts = nn.ModuleList(nn.Linear(24, width, bias=bias) for width, bias in zip((40, 16, 16), biases, strict=True))
        self.head = nn.Linear(24, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        q, k, v = (part(x) for part in self.parts)
        flat = q.view(-1, 8).sum(-1).view(*x.shape[:2], 5).transpose(1, 2).mean(1, keepdim=True).transpose(1, 2)
        return self.head(torch.cat([k, k[..., :8]], -1) * v.mean(-1, keepdim=True) + flat)


@needs_bfloat16
@pytest.mark.parametrize(("biases", "linears"), [((True,) * 3, 2), ((False,) * 3, 2), ((True, False, True), 3)])
def test_linears_of_one_input_become_one(biases: tuple[bool, bool, bool], linears: int, layout: str) -> None:
    graph = graph_of(Branches(biases).bfloat16())
    names = [f"parts.{number}.{kind}" for number in range(3) for kind in ("weight", "bias")]
    storages = [weakref.ref(tensor) for tensor in (tensor_at(graph, name) for name in names) if tensor is not None]
    wanted = [run(graph, *shape) for shape in ((1, 1), (2, 11))]
    report = pack(graph, layouts=[layout])
    assert (report.matched, report.declined) == (4, [])
    assert report.notes[1:] == [f"{5 - linears} linears that share their input with others became 1"]
    assert ops(graph).count(PACKED[layout]) == linears
    gone = 3 + 3 if biases[0] and biases[1] else 3
    assert sum(storage() is None for storage in storages) >= gone
    for shape, each in zip(((1, 1), (2, 11)), wanted, strict=True):
        torch.testing.assert_close(run(graph, *shape), each, rtol=2e-2, atol=2e-2)


@needs_bfloat16
def test_merging_can_be_switched_off(layout: str) -> None:
    graph = graph_of(Branches((True,) * 3).bfloat16())
    assert pack(graph, merge=False, layouts=[layout]).notes == [f"4 weights in the layout {layout}"]
    assert ops(graph).count(PACKED[layout]) == 4


@pytest.mark.skipif(not packs(torch.bfloat16, "native"), reason="this CPU multiplies no pairs of bfloat16")
@pytest.mark.parametrize("shape", [(1, 1), (2, 11)])
def test_a_tied_embedding_reads_its_rows_from_the_packed_weight(shape: tuple[int, int]) -> None:
    graph = graph_of(Net(tied=True).bfloat16())
    unpacked = weakref.ref(tensor_at(graph, "embedding.weight"))
    wanted = run(graph, *shape)
    report = pack(graph, layouts=["native"], duplicate_bytes=0)
    assert (report.matched, report.declined) == (3, [])
    assert report.notes == ["3 weights in the layout native"]
    assert "ad_core.packed_embedding.default" in ops(graph)
    assert unpacked() is None
    torch.testing.assert_close(run(graph, *shape), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not packs(torch.bfloat16, "native"), reason="this CPU multiplies no pairs of bfloat16")
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 97, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (1, 2), (130, 34), (96, 2050)])
def test_a_packed_product_is_rounded_once(tokens: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((tokens, inputs + 3), (outputs, inputs), (outputs,)))
    packed = Native().pack(weight, torch.empty(Native().nbytes(weight), dtype=torch.uint8))
    part = x[:, 1 : inputs + 1]  # rows that lie apart
    wanted = (part.double() @ weight.double().t() + bias.double()).bfloat16()
    apart = torch.stack([bias, bias], -1)[:, 0]  # a view of something wider
    result = packed_linear(part, packed, apart, outputs)
    torch.testing.assert_close(result, wanted, rtol=2**-7, atol=1e-2 * inputs**0.5 / 8)
    assert result.shape == (tokens, outputs)


@pytest.mark.skipif(not packs(torch.bfloat16, "native"), reason="this CPU multiplies no pairs of bfloat16")
def test_an_odd_number_of_inputs_is_left_to_onednn() -> None:
    graph = graph_of(Net(width=25).bfloat16())
    report = pack(graph)
    assert report.matched == 3
    assert sorted(report.notes) == ["1 weight in the layout native", "2 weights in the layout oneDNN"]
