"""The seam of transformers' models: what it reaches, what it captures, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import ad_attention.sparse.op  # noqa: F401  (defines the op)
from ad_attention.match.hf_masks import MaskDescription
from ad_attention.match.hf_seam import HfAttentionSeam
from ad_core.api import Declined
from ad_core.api.errors import CaptureError

SEAM = HfAttentionSeam()

CAPTURED = {
    "llama": (4, {}),
    "gpt2": (4, {}),
    "mistral": (4, {"window": {8}}),
    "gemma2": (4, {"window": {None, 8}, "softcap": {50.0}}),
    "gpt_oss": (4, {"window": {None, 8}, "sinks": {"get_attr"}}),
    "llama4_text": (4, {"chunk": {None, 8}}),
    "deepseek_v3": (4, {}),
    "bart": (4, {}),
}
"""How many attentions, and what their constants are. Covers GQA, MHA, windows, soft-cap, sinks, chunks, expanded MLA, a mask of ones."""

WITHOUT_INTERFACE = [
    "big_bird",
    "bloom",
    "codegen",
    "falcon",
    "falcon-alibi",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "megatron-bert",
    "mpt",
    "mvp",
    "openai-gpt",
    "rembert",
    "roformer",
    "trocr",
    "xglm",
    "xlm",
]
if Version(transformers.__version__) >= Version("5.24"):
    WITHOUT_INTERFACE = [name for name in WITHOUT_INTERFACE if name not in ("codegen", "gptj")]  # these were rewritten for it
REFUSED = {"gemma4_unified": "or_masks", "git": "computes on its attention mask"}


def pytest_generate_tests(metafunc):
    """Every other model of models.json, as slow tests."""
    if "rest" in metafunc.fixturenames:
        import json
        from pathlib import Path

        models = json.loads(Path(__file__).with_name("models.json").read_text())
        metafunc.parametrize("rest", sorted(models.keys() - CAPTURED.keys() - set(WITHOUT_INTERFACE) - REFUSED.keys()))


def capture(driver, name):
    model = driver.build(name)
    assert SEAM.applies(model) is None
    wanted = driver.logits(model)
    entered = []
    with SEAM.open(model, entered.append):
        graph = driver.export(model)
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.ad_attention.attention.default]
    assert entered == [driver.OP] * len(calls)
    assert driver.square_nodes(graph) == []
    assert driver.worst_difference(graph, wanted) < 1e-4
    return calls


@pytest.mark.parametrize(("name", "count", "constants"), [(name, *expected) for name, expected in CAPTURED.items()])
def test_logits_are_the_models_and_no_mask_is_left(driver, name, count, constants):
    calls = capture(driver, name)
    assert len(calls) == count
    for call in calls:
        query, key, value = (argument.meta["val"] for argument in call.args[:3])
        assert query.shape[:2] == key.shape[:2] == value.shape[:2]
        assert (query.shape[2] % key.shape[2], key.shape[2]) == (0, value.shape[2])
    for argument in ("window", "chunk", "softcap", "sinks"):
        found = {getattr(value, "op", value) for value in (call.kwargs.get(argument) for call in calls)}
        assert found == constants.get(argument, {None}), argument


@pytest.mark.slow
def test_every_other_model_of_softmax_attention(driver, rest):
    assert capture(driver, rest)


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_models_that_do_not_consult_the_interface_are_declined(driver, name):
    why = SEAM.applies(driver.build(name))
    assert isinstance(why, Declined)
    assert "attention interface" in why.reason


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_models_that_do_more_than_the_interface_fail_loudly(driver, name, why):
    model = driver.build(name)
    with SEAM.open(model, lambda op: None), pytest.raises((CaptureError, TypeError), match=why):
        driver.export(model)


def test_a_module_of_another_library_is_declined():
    assert "holds no transformers model" in SEAM.applies(nn.Linear(2, 2)).reason


def test_a_wrapped_model_is_reached(driver):
    assert SEAM.applies(nn.Sequential(nn.Identity(), driver.build("gpt2"))) is None


# -- no trace ---------------------------------------------------------------------------------------------------------


def state(model):
    """Everything that the seam may touch: the registries, and each configuration of the model with all it holds."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    held = {key: copy.deepcopy(vars(config)) for key, config in configs.items()}
    return (
        dict(ALL_ATTENTION_FUNCTIONS),
        dict(ALL_MASK_ATTENTION_FUNCTIONS),
        {key: str(sorted(value.items())) for key, value in held.items()},
    )


@pytest.mark.parametrize("name", ["llama", "llama4", "gemma3"])
def test_the_module_and_the_registries_are_as_they_were(driver, name):
    model = driver.build(name, "eager")
    before, wanted = state(model), driver.logits(model)
    with SEAM.open(model, lambda op: None):
        assert state(model) != before
    assert state(model) == before
    assert all(torch.equal(logits, wanted[shape]) for shape, logits in driver.logits(model).items())


def test_they_are_put_back_when_the_export_raises(driver):
    model = driver.build("llama")
    before = state(model)
    with pytest.raises(ZeroDivisionError), SEAM.open(model, lambda op: None):
        raise ZeroDivisionError
    assert state(model) == before


def test_two_captures_at_once_do_not_meet(driver):
    first, second = driver.build("llama"), driver.build("gpt2")
    before = state(first)
    counts = {"first": 0, "second": 0}

    def counter(name):
        def entered(op):
            counts[name] += 1

        return entered

    with SEAM.open(first, counter("first")):
        with SEAM.open(second, counter("second")):
            assert first.config._attn_implementation != second.config._attn_implementation
            driver.logits(second)
            assert counts == {"first": 0, "second": 16}
        driver.logits(first)
    assert counts == {"first": 16, "second": 16}
    assert state(first) == before


# -- refusals of one call ---------------------------------------------------------------------------------------------


@pytest.fixture
def attend(driver):
    """Calls the attention interface as a layer of the model would, with one thing changed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = driver.build("llama")
    part = model.model.layers[2].self_attn
    entered = []

    def call(**changed):
        operands = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6)}
        arguments = {**operands, "attention_mask": MaskDescription(), "scaling": 0.5, "dropout": 0.0, **changed}
        return ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation](part, **arguments)

    with SEAM.open(model, entered.append):
        yield SimpleNamespace(call=call, entered=entered)


def test_a_plain_call_goes_to_the_op(attend):
    result, weights = attend.call(position_ids=torch.arange(5)[None], use_cache=False, output_attentions=True, indices=None)
    assert (result.shape, weights) == ((2, 5, 4, 6), None)
    assert attend.entered == ["ad_attention::attention"]


def test_a_call_that_chooses_its_keys_goes_to_the_op_of_that(attend):
    result, _ = attend.call(indices=torch.zeros(2, 5, 3, dtype=torch.int32))
    assert result.shape == (2, 5, 4, 6)
    assert attend.entered == ["ad_attention::selected"]


def by_hand(query, key, value, allowed, bias=0.0, sinks=None):
    """[B, S, H, Dv] in float64; `allowed` [S, L]."""
    query, key, value = (x.double() for x in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    scores = (query @ key.mT * 0.5 + bias).masked_fill(~allowed, float("-inf")).exp()
    total = scores.sum(-1, keepdim=True) + (0 if sinks is None else sinks.double().exp())
    return (scores / total @ value).transpose(1, 2)


@pytest.mark.parametrize("given", [("position_bias",), ("sinks",), ("position_bias", "sinks")])
def test_a_bias_or_sinks_of_its_own_are_written_out_for_the_matchers(attend, given):
    operands = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6)}
    own = {"position_bias": torch.randn(2, 4, 5, 5), "sinks": torch.randn(2, 4, 5, 1)}
    result, _ = attend.call(**operands, attention_mask=MaskDescription(window=3), **{name: own[name] for name in given})
    distance = torch.arange(5)[:, None] - torch.arange(5)
    bias, sinks = (own[name] if name in given else None for name in ("position_bias", "sinks"))
    wanted = by_hand(**operands, allowed=(distance >= 0) & (distance < 3), bias=0.0 if bias is None else bias, sinks=sinks)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    assert attend.entered == []


def test_attention_to_all_keys_is_written_out_for_the_verifier_to_see_whose_they_are(attend):
    operands = {"query": torch.randn(2, 4, 3, 8), "key": torch.randn(2, 2, 7, 8), "value": torch.randn(2, 2, 7, 6)}
    result, _ = attend.call(**operands, attention_mask=None, is_causal=False)
    wanted = by_hand(**operands, allowed=torch.ones(3, 7, dtype=torch.bool))
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    assert attend.entered == []


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"attention_mask": None}, "without a mask"),
        ({"attention_mask": torch.zeros(2, 1, 5, 5)}, "mask is a Tensor that the model made itself"),
        ({"attention_mask": MaskDescription(problem="it is not causal")}, "it is not causal"),
        ({"is_causal": False}, "is_causal=False"),
        ({"sliding_window": 4}, "sliding_window is 4 and its mask's window is None"),
        ({"sliding_window": 4, "attention_mask": MaskDescription(window=5)}, "sliding_window is 4 and its mask's window is 5"),
        ({"attention_mask": MaskDescription(window=5, chunk=4)}, "window .* and chunks"),
        ({"scaling": torch.ones(4)}, "scaling is a Tensor"),
        ({"indices": torch.zeros(2, 5, 3), "attention_mask": MaskDescription(window=5)}, "chooses its keys and has a window"),
        ({"indices": torch.zeros(2, 5, 3), "position_bias": torch.zeros(2, 4, 5, 5)}, "chooses its keys and has .* a bias"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
        ({"s_aux": torch.zeros(1, 4, 1, 1)}, "sinks have the shape"),
        ({"attention_mask": None, "is_causal": False, "head_mask": torch.ones(4)}, "head_mask"),
        ({"key": torch.randn(2, 2, 7, 8), "value": torch.randn(2, 2, 7, 6)}, "different length"),
        ({"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 6)}, "4 query heads over 3 key heads"),
    ],
)
def test_what_the_op_would_not_compute_is_refused_with_the_place(attend, changed, why):
    with pytest.raises(CaptureError, match=why) as caught:
        attend.call(**changed)
    assert caught.value.where == "model.layers.2.self_attn (LlamaAttention)"
    assert attend.entered == []
