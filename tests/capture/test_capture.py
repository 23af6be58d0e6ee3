"""The ways in, and the verifier that decides between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ad_attention.plugin
from ad_core.api import Declined, Seam
from ad_core.api.errors import CaptureError, CheckpointError, UnclaimedMixerError
from ad_core.capture import capture, open_model
from ad_core.capture import verify as verifier
from ad_core.graph.ops import find_op
from ad_core.passes.core import clean_passes
from ad_core.passes.manager import PassManager
from ad_core.plan import Plan
from ad_core.registry import isolated
from ad_core.registry.records import Offer

from .models import Toy, build, positions, prompt, run

ATTENTION = "ad_attention::attention"


class Capture:
    """One capture with the attention plugin, and its plan."""

    def __init__(self, model, *, seams=None, matchers=None, **options):
        registry = isolated(ad_attention.plugin)
        self.source, self.plan = open_model(model), Plan()
        manager = PassManager([(each, "ad-core", {}) for each in clean_passes()], self.plan)
        from ad_core.api.types import Stage

        self.result = capture(
            self.source,
            plan=self.plan,
            seams=registry.seams() if seams is None else [Offer(seam, "tests", "dist") for seam in seams],
            matchers=registry.matchers() if matchers is None else [],
            ops=[ATTENTION],
            clean=lambda graph: manager.run(graph, [Stage.CLEAN], device=torch.device("cpu")),
            **options,
        )


def tried(plan):
    return [(attempt.way, attempt.accepted) for attempt in plan.attempts]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_a_model_with_the_attention_interface_goes_through_the_seam(kind):
    done = Capture(model := build(kind))
    layers = model.config.num_hidden_layers
    assert tried(done.plan) == [("seams", True)]
    assert done.result.numbers
    assert done.result.entered == {ATTENTION: layers}
    assert [(claim.op, claim.by) for claim in done.plan.claims] == [(ATTENTION, "seam hf.attention")] * layers
    assert [claim.module for claim in done.plan.claims] == [f"model.layers.{index}.self_attn" for index in range(layers)]
    assert done.plan.claims[0].module_class.endswith("Attention")
    assert "numbers verified: logits equal at 3 shapes" in done.plan.attempts[0].reason
    ids = prompt(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(run(done.result.graph, ids), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_a_directory_is_loaded_once_for_the_comparison(tmp_path):
    build("llama").save_pretrained(tmp_path)
    done = Capture(tmp_path)
    assert done.result.loaded
    assert not any(tensor.is_meta for tensor in [*done.result.graph.parameters(), *done.result.graph.buffers()])
    done = Capture(tmp_path, verify=False)
    assert not done.result.loaded
    assert any(tensor.is_meta for tensor in done.result.graph.parameters())
    assert done.plan.attempts[0].reason == "structure verified, numbers not: switched off"
    done = Capture(tmp_path, size_limit=1000)
    assert "more than the limit" in done.plan.attempts[0].reason
    assert Capture(tmp_path, size_limit=1000, verify=True).result.numbers


def test_without_seams_patterns_find_the_same_attention():
    done = Capture(build("llama"), seams=[])
    assert tried(done.plan) == [("patterns on sdpa", True)]
    assert {claim.by for claim in done.plan.claims} == {"matcher attention.sdpa"}
    assert len(done.plan.claims) == 3


def test_a_model_that_only_has_eager_attention_gets_there_in_the_end():
    done = Capture(model := build("bloom"))
    assert tried(done.plan) == [("seams", False), ("patterns on sdpa", False), ("patterns on eager", True)]
    assert "no class of BloomForCausalLM goes through" in done.plan.attempts[0].reason
    assert {claim.by for claim in done.plan.claims} == {"matcher attention.softmax"}
    assert model.config._attn_implementation == build("bloom").config._attn_implementation


class Annotated(nn.Module):
    """An author who calls the canonical op."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(48, 16), nn.Linear(16, 48)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(16, 48)}) for _ in range(2))

    def forward(self, input_ids, position_ids=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            q, k, v = layer["qkv"](x).unflatten(-1, (3, 2, 8)).unbind(2)
            x = x + find_op(ATTENTION)(q, k, v, scale=0.3).flatten(2)
        return self.head(x)


def test_canonical_ops_that_the_author_wrote_pass_untouched():
    done = Capture(Annotated())
    assert tried(done.plan) == [("seams", False), ("as written", True)]
    assert [claim.by for claim in done.plan.claims] == ["annotated", "annotated"]
    assert Capture(Toy()).plan.claims == []


class Mixes(Toy):
    def forward(self, input_ids, position_ids=None):
        x = self.embed(input_ids)
        return self.head(x.cumsum(1))


def test_a_mixer_that_nothing_claims_is_refused_with_every_way_that_was_tried():
    with pytest.raises(UnclaimedMixerError, match=r"(?s)1 graph region mixes tokens.*as written.*no installed plugin claims"):
        Capture(Mixes())
    with pytest.raises(UnclaimedMixerError, match=r"(?s)model\.layers\.\{0,1,2\}\.self_attn.*patterns on sdpa.*patterns on eager"):
        Capture(build("llama"), seams=[], matchers=[])


def test_when_what_mixes_lies_beside_the_seams_no_other_way_is_tried():
    model = build("llama")
    model.model.norm = Cumulative()
    with pytest.raises(UnclaimedMixerError, match="seams: 1 graph region mixes") as refused:
        Capture(model)
    assert "patterns" not in str(refused.value)


class Cumulative(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_a_module_that_looks_ahead_is_refused_for_that_whatever_else_is_wrong():
    class Ahead(Toy):
        def forward(self, input_ids, position_ids=None):
            x = self.embed(input_ids)
            return self.head(x + x.mean(1, keepdim=True))

    with pytest.raises(
        CaptureError, match=r"(?s)Ahead cannot be served token by token.*its logits for 9 tokens differ by .* 291 more"
    ) as refused:
        Capture(Ahead())
    assert "as written: 1 graph region mixes tokens" in str(refused.value)
    with pytest.raises(UnclaimedMixerError):
        Capture(Ahead(), verify=False)


def test_a_module_that_draws_random_numbers_is_refused_for_that():
    class Draws(Mixes):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids) * torch.rand(())

    with pytest.raises(CaptureError, match=r"for the same 300 tokens differ by .* between two runs: it draws random numbers"):
        Capture(Draws())


def test_a_module_that_looks_ahead_with_one_attention_only_is_told_of_the_other():
    model = build("llama")

    class Ahead(type(model)):
        def forward(self, input_ids, **others):
            output = super().forward(input_ids, **others)
            if self.config._attn_implementation == "sdpa":
                output.logits = output.logits.flip(1)
            return output

    model.__class__ = Ahead
    with pytest.raises(
        CaptureError, match=r"(?s)looks ahead.*with eager attention it agrees with itself: set attn_implementation to 'eager'"
    ):
        Capture(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert tried(Capture(model).plan) == [("seams", True)]


class Wrong(Seam):
    """Puts attention in, but not the model's: the scale is another."""

    name, produces, factor = "tests.wrong", ATTENTION, 1.1

    def rounded(self, result):
        return result

    def applies(self, module):
        return None

    def open(self, module, entered):
        from contextlib import contextmanager

        from transformers.modeling_utils import AttentionInterface

        @contextmanager
        def scope():
            def attend(part, query, key, value, mask, scaling=None, **others):
                entered(ATTENTION)
                result = find_op(ATTENTION)(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scaling * self.factor)
                return self.rounded(result), None

            before = module.config._attn_implementation_internal
            AttentionInterface._global_mapping["tests"] = attend
            module.config._attn_implementation_internal = "tests"
            try:
                yield
            finally:
                module.config._attn_implementation_internal = before
                del AttentionInterface._global_mapping["tests"]

        return scope()


def test_a_seam_that_changes_the_numbers_is_caught_and_the_next_way_is_taken():
    done = Capture(model := build("llama"), seams=[Wrong()])
    assert tried(done.plan) == [("seams", False), ("patterns on sdpa", True)]
    assert "logits differ from the module's at batch 2, length 9 (the relative difference is" in done.plan.attempts[-2].reason
    assert {claim.by for claim in done.plan.claims} == {"matcher attention.sdpa"}
    assert "sdpa" in model.config._attn_implementation
    accepted = Capture(build("llama"), seams=[Wrong()], verify=False)
    assert tried(accepted.plan) == [("seams", True)]


def test_when_every_way_fails_each_is_named_with_its_reason():
    class Fails(Toy):
        def forward(self, input_ids, position_ids=None):
            raise RuntimeError("not today")

    with pytest.raises(
        CaptureError, match=r"(?s)Fails cannot be captured.*hf\.attention: Fails holds no.*as written: RuntimeError: not today"
    ):
        Capture(Fails())


def test_a_seam_is_not_used_outside_of_its_versions_and_closed_when_the_export_raises():
    class Old(Wrong):
        transformers = "<4"

    done = Capture(build("llama"), seams=[Old()])
    assert tried(done.plan) == [("seams", False), ("patterns on sdpa", True)]
    assert "known to hold for transformers <4" in done.plan.attempts[-2].reason
    events = []

    class Breaks(Seam):
        name, produces = "tests.breaks", ATTENTION

        def applies(self, module):
            return Declined("not this one") if getattr(module, "shy", False) else None

        def open(self, module, entered):
            from contextlib import contextmanager

            @contextmanager
            def scope():
                events.append("open")
                module.forward = None
                try:
                    yield
                finally:
                    del module.forward
                    events.append("closed")

            return scope()

    module = Toy()
    done = Capture(module, seams=[Breaks()])
    assert tried(done.plan) == [("seams", False), ("as written", True)]
    assert events == ["open", "closed"]
    assert "forward" not in vars(module)


def test_a_seam_whose_op_is_not_in_the_graph_is_caught():
    class Vanishes(Toy):
        def forward(self, input_ids, position_ids=None):
            x = self.embed(input_ids)
            find_op(ATTENTION)(x[:, :, None], x[:, :, None], x[:, :, None], scale=1.0)
            return self.head(x)

    with pytest.raises(CaptureError, match="1 calls of ad_attention::attention were made in the module and 0 are in its graph"):
        Capture(Vanishes())


def test_faults_of_the_checkpoint_are_not_blamed_on_the_way_in(tmp_path):
    from safetensors.torch import load_file, save_file

    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        Capture(tmp_path)


class Offset(Toy):
    """Positions start at 2, unless they are given: a graph that is given 0, 1, 2 ... is another model, so it is left to its own."""

    def __init__(self, weight=False):
        super().__init__()
        self.places = nn.Embedding(99, 16)
        offset = torch.tensor(2)
        self.offset = nn.Parameter(offset, requires_grad=False) if weight else offset

    def forward(self, input_ids, position_ids=None):
        places = positions(input_ids) + self.offset if position_ids is None else position_ids
        return self.head(self.embed(input_ids) + self.places(places))


@pytest.mark.parametrize("verify", [True, False])
def test_positions_that_a_module_counts_otherwise_are_its_own_though_no_numbers_are_compared(verify):
    done = Capture(Offset(), verify=verify)
    assert done.plan.attempts[-1].accepted
    assert all(attempt.way.endswith(", its own positions") for attempt in done.plan.attempts[1:])  # no seam reaches it


def test_a_count_that_depends_on_a_weight_is_found_by_comparing_numbers():
    done = Capture(Offset(weight=True))
    assert [attempt.accepted for attempt in done.plan.attempts][-2:] == [False, True]
    assert "logits differ from the module's at batch 1, length 1" in done.plan.attempts[-2].reason
    assert done.plan.attempts[-1].way.endswith(", its own positions")


def test_the_module_in_memory_still_trains_after_its_capture():
    model = build("llama").train().requires_grad_(True)
    Capture(model)
    assert model.training
    loss = model(input_ids=prompt(1, 5), labels=prompt(1, 5)).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tolerance_lets_rounding_pass_and_a_small_fault_not(dtype, monkeypatch):
    model = build("llama").to(dtype)
    done = Capture(model)
    names = [attempt.reason for attempt in done.plan.attempts]
    assert "numbers verified" in names[0]
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    allowed = verifier._TOLERANCE[dtype]
    assert verifier.distance(logits * (1 + allowed / 10), logits, dtype) < allowed
    wrong = logits.clone()
    wrong[:, -1] = logits[:, 0]
    assert verifier.distance(wrong, logits, dtype) > allowed
    assert verifier.distance(logits * float("nan"), logits, dtype) != verifier.distance(logits, logits, dtype)


class Rounding(Wrong):
    """The model's attention, whose result is rounded once more."""

    name, factor = "tests.rounding", 1.0

    def rounded(self, result):
        return ((result * 1.25) / 1.25).to(result.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounds_further_than_the_tolerance_is_judged_by_the_module_in_float32(dtype, monkeypatch):
    monkeypatch.setitem(verifier._TOLERANCE, dtype, 1e-6)
    done = Capture(model := build("llama").to(dtype), seams=[Rounding()])
    assert tried(done.plan) == [("seams", True)]
    assert "in float32, for rounding is larger in this model" in done.plan.attempts[0].reason
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    wrong = Capture(build("llama").to(dtype), seams=[Wrong()])
    assert tried(wrong.plan) == [("seams", False), ("patterns on sdpa", True)]
