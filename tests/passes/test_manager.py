"""The manager runs, reports, and names the first pass that breaks the graph or its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api import Pass, PassContext, PassReport, Stage
from ad_core.api.errors import GraphInvalidError, NumericGuardError, PluginBrokenError
from ad_core.api.types import Safety
from ad_core.graph.edit import insert_call, is_op, new_input, output_node, replace, set_tensor
from ad_core.passes.core import clean_passes
from ad_core.passes.manager import PassManager
from ad_core.plan import PassEntry, Plan

from ..exported import VOCABULARY, Small, apply, export, export_model

aten = torch.ops.aten
CPU = torch.device("cpu")


class Toy(Pass):
    """A pass made of a function."""

    def __init__(
        self,
        name: str,
        stage: Stage,
        function: Callable[[GraphModule], object],
        safety: Safety = "exact",
        requires_ops: tuple[str, ...] = (),
    ):
        self.name, self.stage, self.function, self.safety, self.requires_ops = name, stage, function, safety, requires_ops
        self.seen: PassContext | None = None

    def run(self, graph: GraphModule, context: PassContext) -> PassReport:
        self.seen = context
        result = self.function(graph)
        return result if isinstance(result, PassReport) else PassReport(matched=1)


def managed(
    graph: GraphModule, *passes: Pass, verify: bool = True, stages: tuple[Stage, ...] = tuple(Stage), size_limit: int = 1 << 30
) -> list[PassEntry]:
    plan = Plan()
    manager = PassManager([(each, "ad-toy", {"key": 1}) for each in passes], plan, verify=verify, size_limit=size_limit)
    manager.run(graph, stages, device=CPU, dtype=torch.float32)
    return plan.passes


@pytest.fixture
def graph() -> GraphModule:
    graph = export(Small())
    apply(graph, clean_passes())
    return graph


def scaled(factor: float) -> Callable[[GraphModule], object]:
    """Multiplies the logits."""

    def change(graph: GraphModule) -> None:
        output = output_node(graph.graph)
        output.args = ((insert_call(output, aten.mul.Tensor, output.args[0][0], factor),),)

    return change


def nothing(graph: GraphModule) -> PassReport:
    return PassReport(declined=["no such pattern at head"], notes=["looked"])


def test_passes_run_in_order_with_their_reports_in_the_plan(graph: GraphModule) -> None:
    first, second = Toy("b", Stage.CLEAN, nothing), Toy("a", Stage.FUSE, lambda graph: PassReport(matched=3))
    entries = managed(graph, second, first)
    assert [(entry.name, entry.stage, entry.distribution, entry.matched) for entry in entries] == [
        ("b", "CLEAN", "ad-toy", 0),
        ("a", "FUSE", "ad-toy", 3),
    ]
    assert entries[0].declined == ("no such pattern at head",)
    assert entries[0].notes == ("looked",)
    assert all(entry.seconds > 0 for entry in entries)
    assert first.seen is not None
    assert (first.seen.device, first.seen.dtype, first.seen.options) == (CPU, torch.float32, {"key": 1})


def test_only_the_wanted_stages_run(graph: GraphModule) -> None:
    passes = [Toy(stage.name, stage, nothing) for stage in (Stage.CLEAN, Stage.FUSE, Stage.CACHE)]
    assert [entry.name for entry in managed(graph, *passes, stages=(Stage.CACHE, Stage.CLEAN))] == ["CLEAN", "CACHE"]


def test_a_pass_without_its_ops_is_skipped_with_a_note(graph: GraphModule) -> None:
    skipped, run = (
        Toy("a", Stage.FUSE, scaled(2), requires_ops=("ad_toy::op",)),
        Toy("b", Stage.FUSE, nothing, requires_ops=("aten::linear",)),
    )
    first, second = managed(graph, skipped, run)
    assert first.notes == ("skipped: the graph has no ad_toy::op",)
    assert skipped.seen is None
    assert second.notes == ("looked",)


def test_a_pass_that_keeps_the_numbers_says_so(graph: GraphModule) -> None:
    (entry,) = managed(graph, Toy("same", Stage.FUSE, scaled(1.0)))
    assert entry.guard == "differs by 0.0e+00, allowed 1e-05 (exact)"


def test_the_first_pass_that_changes_the_numbers_is_named(graph: GraphModule) -> None:
    passes = [Toy("a.good", Stage.FUSE, scaled(1.0)), Toy("b.bad", Stage.FUSE, scaled(1.01)), Toy("c.worse", Stage.FUSE, scaled(2))]
    with pytest.raises(NumericGuardError) as caught:
        managed(graph, *passes)
    assert "the pass b.bad changed the model's numbers" in str(caught.value)
    assert "ad-toy" in str(caught.value)
    assert "differ by 0.01" in str(caught.value)


@pytest.mark.parametrize(
    ("safety", "factor", "passes"),
    [("exact", 1 + 5e-5, False), ("reordered", 1 + 5e-5, True), ("reordered", 1.01, False), ("lossy", 1.1, True), ("lossy", 2.0, False)],
)
def test_tolerance_follows_the_declared_safety(graph: GraphModule, safety: Safety, factor: float, passes: bool) -> None:
    toy = Toy("toy", Stage.FUSE, scaled(factor), safety)
    if passes:
        managed(graph, toy)
    else:
        with pytest.raises(NumericGuardError):
            managed(graph, toy)


def test_logits_of_another_shape_and_logits_that_are_not_numbers_are_changed_numbers(graph: GraphModule) -> None:
    def cut(graph: GraphModule) -> None:
        output = output_node(graph.graph)
        output.args = ((insert_call(output, aten.slice.Tensor, output.args[0][0], 2, 0, 5),),)

    for change in (scaled(float("nan")), scaled(float("inf")), cut):
        with pytest.raises(NumericGuardError, match="differ by inf"):
            managed(graph, Toy("toy", Stage.FUSE, change, "lossy"))
        apply(graph, [Toy("undo", Stage.FUSE, undo)])


def undo(graph: GraphModule) -> None:
    output = output_node(graph.graph)
    output.args = ((output.args[0][0].args[0],),)


def test_without_verify_nothing_is_checked(graph: GraphModule) -> None:
    (entry,) = managed(graph, Toy("bad", Stage.FUSE, scaled(2)), verify=False)
    assert entry.guard == "off"


def test_a_graph_that_no_longer_runs_is_the_pass_s_fault(graph: GraphModule) -> None:
    def breaks(graph: GraphModule) -> None:
        node = next(node for node in graph.graph.nodes if is_op(node, "aten::linear"))
        node.args = (node.args[0], node.args[2])  # the bias in the place of the weight

    with pytest.raises(NumericGuardError, match="no longer runs after the pass breaks"):
        managed(graph, Toy("breaks", Stage.FUSE, breaks))


def test_weights_that_are_not_loaded_are_made_up(graph: GraphModule) -> None:
    with torch.device("meta"):
        model = Small().bfloat16()
    graph = export(model)
    apply(graph, clean_passes())
    (entry,) = managed(graph, Toy("same", Stage.MATCH, scaled(1.0)), stages=(Stage.MATCH,))
    assert entry.guard.startswith("differs by 0.0e+00, allowed 1e-05")  # in float32, whatever the model's dtype
    with pytest.raises(NumericGuardError):
        managed(graph, Toy("bad", Stage.MATCH, scaled(1.001)), stages=(Stage.MATCH,))


def test_new_weights_without_values_make_the_guard_inert() -> None:
    with torch.device("meta"):
        graph = export(Small())
    apply(graph, clean_passes())

    def quantise(graph: GraphModule) -> None:
        read = next(node for node in graph.graph.nodes if node.op == "get_attr" and node.target == "head.weight")
        set_tensor(graph, "head.packed", torch.empty(VOCABULARY, 8, device="meta"))
        with graph.graph.inserting_before(read):
            packed = graph.graph.get_attr("head.packed")
        packed.meta = dict(read.meta)
        replace(read, packed)

    (entry,) = managed(graph, Toy("toy.quantise", Stage.QUANTIZE, quantise, "lossy"), stages=(Stage.QUANTIZE,))
    assert entry.guard.startswith("inert: 1 weights (head.packed ...) are new")


def test_a_pass_that_loads_weights_makes_the_guard_inert() -> None:
    with torch.device("meta"):
        graph = export(Small())
    apply(graph, clean_passes())

    def load(graph: GraphModule) -> None:
        for path, value in Small().state_dict().items():
            set_tensor(graph, path, value)

    (entry,) = managed(graph, Toy("toy.load", Stage.LOAD, load), stages=(Stage.LOAD,))
    assert entry.guard == "inert: 3 weights got their values from the pass"


def test_above_the_size_limit_the_guard_says_that_it_is_inert(graph: GraphModule) -> None:
    plan = Plan()
    passes = [Toy("bad", Stage.FUSE, scaled(2)), Toy("worse", Stage.FUSE, scaled(3))]
    PassManager([(each, "ad-toy", {}) for each in passes], plan, verify=True, size_limit=1000).run(graph, Stage.FUSE, device=CPU)
    assert all(entry.guard.startswith("inert: the weights take 0 MiB, above the limit") for entry in plan.passes)
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("numeric guard inert: the weights take")


def test_inputs_of_the_engine_make_the_guard_inert(graph: GraphModule) -> None:
    def add_pool(graph: GraphModule) -> None:
        new_input(graph, "pool", torch.zeros(3))

    (entry,) = managed(graph, Toy("insert", Stage.CACHE, add_pool), stages=(Stage.CACHE,))
    assert entry.guard == "inert: the input pool belongs to the engine's packed batch and cannot be made up here"


def test_a_graph_against_its_spec_names_the_pass(graph: GraphModule) -> None:
    def writes(graph: GraphModule) -> None:
        output = output_node(graph.graph)
        insert_call(output, aten.relu_.default, insert_call(output, aten.zeros.default, [2]))

    with pytest.raises(GraphInvalidError, match=r"after the pass writer(?s:.)*\[functional\]"):
        managed(graph, Toy("writer", Stage.FUSE, writes))


def test_a_stage_that_does_not_bring_about_its_rules_is_an_error() -> None:
    with pytest.raises(GraphInvalidError, match="at the end of stage CLEAN"):
        managed(export_with_assertion(), Toy("idle", Stage.CLEAN, nothing), stages=(Stage.CLEAN,))


def export_with_assertion() -> GraphModule:
    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = Small()

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.small(input_ids).to(torch.float32)  # leaves an assertion on the metadata

    graph = export(Asserting())
    assert any("_assert" in str(node.target) for node in graph.graph.nodes)
    return graph


def test_a_graph_out_of_order_is_an_error_even_without_verify(graph: GraphModule) -> None:
    def reverse(graph: GraphModule) -> None:
        node = next(node for node in graph.graph.nodes if is_op(node, "aten::linear"))
        next(iter(graph.graph.nodes)).prepend(node)

    with pytest.raises(GraphInvalidError, match="the pass reverse left a graph that is not well formed"):
        managed(graph, Toy("reverse", Stage.FUSE, reverse), verify=False)


def test_a_pass_that_raises_is_named(graph: GraphModule) -> None:
    def fails(graph: GraphModule) -> None:
        raise KeyError("q_proj")

    with pytest.raises(PluginBrokenError, match=r"the pass toy\.fails raised KeyError") as caught:
        managed(graph, Toy("toy.fails", Stage.FUSE, fails))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_reports_nothing_is_named(graph: GraphModule) -> None:
    class Silent(Pass):
        name, stage = "toy.silent", Stage.FUSE

        def run(self, graph: GraphModule, context: PassContext) -> PassReport:
            return None  # type: ignore[return-value]

    with pytest.raises(PluginBrokenError, match="returned no PassReport"):
        managed(graph, Silent())


def test_the_core_s_own_clean_up_passes_its_own_guard() -> None:
    entries = managed(export_model("gpt2", positions=False), *clean_passes(), stages=(Stage.CLEAN,))
    assert [entry.guard for entry in entries] == ["differs by 0.0e+00, allowed 1e-05 (exact)"] * len(entries)
    assert {entry.name for entry in entries if entry.matched} >= {"core.asserts", "core.clean", "core.transposes", "core.positions"}
