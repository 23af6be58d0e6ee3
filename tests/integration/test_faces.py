"""`LLM` and `compile` as users meet them: what they answer, what they refuse and how, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ad_core
from ad_core import LLM, SamplingParams
from ad_core.api import errors

from ..zoo_models import VOCABULARY, greedy, ids, logits_of, tiny

SMALL = {"max_batch_tokens": 8, "page_size": 4, "max_requests": 4, "memory": "1MiB", "max_model_len": 64}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class Plain(nn.Module):
    """A research module: no configuration, no base class of transformers, attention through PyTorch's own function."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(128, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed(input_ids) + self.place(position_ids)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(x + mixed.transpose(1, 2).flatten(2))


class Running(nn.Module):
    """Mixes tokens by a running sum, which no plugin claims."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mixer = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(self.embed(input_ids).cumsum(1))


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def llm(module: nn.Module) -> Iterator[LLM]:
    with LLM(module, **SMALL, max_queued_requests=3) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to the shared engine, it answers as before and every page is accounted for."""
    yield
    if "llm" in request.fixturenames:
        engine, model = request.getfixturevalue("llm"), request.getfixturevalue("module")
        assert engine.generate(ids(5), GREEDY)[0].outputs[0].token_ids == greedy(model, ids(5), 8)
        engine._engine.cache.audit()


# -- modules in memory ------------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_is_served_and_left_as_it_was():
    torch.manual_seed(0)
    plain = Plain().train()
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in plain.state_dict().items()}
    with LLM(plain, **SMALL) as engine:
        outputs = engine.generate([ids(1), ids(9), ids(33)], GREEDY)
    assert plain.training
    assert {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()} == {name: at for name, (at, _) in state.items()}
    assert all(torch.equal(tensor, state[name][1]) for name, tensor in plain.state_dict().items())
    for output, length in zip(outputs, (1, 9, 33), strict=True):
        assert output.outputs[0].token_ids == greedy(plain.eval(), ids(length), 8)


def test_a_module_that_says_no_length_needs_one_unless_its_table_of_positions_does():
    class Placeless(Plain):
        def forward(self, input_ids):
            return super().forward(input_ids, torch.zeros_like(input_ids))

    options = {key: value for key, value in SMALL.items() if key != "max_model_len"}
    with pytest.raises(errors.ConfigError, match="max_model_len"):
        LLM(Placeless(), **options)
    with LLM(Plain(), **options) as llm:
        assert llm.max_length == 128


def test_a_mixer_that_nothing_claims_is_refused_with_its_place():
    with pytest.raises(errors.UnclaimedMixerError, match="cumsum") as caught:
        LLM(Running(), **SMALL)
    assert "Installed: attention" in str(caught.value)


def test_compile_gives_the_models_logits_at_any_shape(module):
    graph = ad_core.compile(module, torch.tensor([ids(5)]))
    for length in (1, 7, 30):
        got = graph(torch.tensor([ids(length)]))[0]
        torch.testing.assert_close(got, logits_of(module, ids(length)), rtol=1e-4, atol=1e-4)
    assert {claim.op for claim in graph.plan.claims} == {"ad_attention::attention"}


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_sise": 4}, "page_size"),
        ({"page_size": 0}, "page_size"),
        ({"memory": "much"}, "memory"),
        ({"memory": 64}, "cannot hold"),
        ({"backend": "magic"}, "eager"),
        ({"device": "tpu7"}, "device"),
        ({"kernels": {"ad_attention::attention": "attention.softmax.tritn"}}, "attention.softmax.triton"),
        ({"kernels": {"ad_attention::attention": "attention.softmax.triton"}}, "(?i)triton"),
        ({"plugins": {"attention": {"speed": 11}}}, "attention"),
    ],
)
def test_options_that_cannot_work_are_errors_that_say_why(module, options, message):
    with pytest.raises(errors.AdError, match=message):
        LLM(module, **{**SMALL, **options})


def test_a_file_of_options_is_as_strict_as_arguments(module, tmp_path):
    path = tmp_path / "engine.toml"
    path.write_text("max_batch_tokns = 8\n")
    with pytest.raises(errors.ConfigError, match="max_batch_tokens") as caught:
        LLM(module, config=path)
    assert str(path) in str(caught.value)


def test_without_the_plugin_the_message_says_what_is_missing(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    code = f"from ad_core import LLM\nLLM({str(tmp_path)!r})"
    environment = {**os.environ, "AD_DISABLE_PLUGINS": "attention"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert "UnclaimedMixerError" in done.stderr
    assert "AD_DISABLE_PLUGINS" in done.stderr


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", errors.InvalidRequestError, "empty"),
        ([[]], errors.InvalidRequestError, "empty"),
        ("text", errors.TokenizerMissingError, "token ids"),
        ([{"role": "user", "content": "hello"}], errors.TokenizerMissingError, "token ids"),
        ([1, -2], errors.InvalidRequestError, "-2"),
        ([1, VOCABULARY], errors.InvalidRequestError, str(VOCABULARY)),
        ([1, "two"], errors.InvalidRequestError, "token ids"),
        (17, errors.InvalidRequestError, "token ids"),
        (list(range(4, 69)), errors.PromptTooLongError, r"65.*64"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(llm, prompt, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY)


def test_a_prompt_longer_than_the_cache_is_refused_with_both_numbers(module):
    page = 2 * 2 * 16 * 4 * 2 * 4  # bytes of 4 tokens: keys and values, 2 heads of 16, float32, 2 layers
    with LLM(module, **{**SMALL, "memory": 5 * page}) as engine:
        with pytest.raises(errors.PromptTooLongError, match=r"20.*16"):
            engine.generate(ids(20), GREEDY)
        assert engine.generate(ids(9), SamplingParams(temperature=0.0, max_tokens=3)).pop().error is None


@pytest.mark.parametrize("count", [0, 1])
def test_the_smallest_answers(llm, count):
    answer = llm.generate(ids(9), SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (count, "length")


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": -1}, {"n": 0}, {"tempersture": 1.0}])
def test_sampling_parameters_that_make_no_sense_are_refused(wrong):
    with pytest.raises(errors.InvalidRequestError):
        SamplingParams(**wrong)


def test_as_many_parameters_as_prompts(llm):
    with pytest.raises(errors.InvalidRequestError, match="2 prompts and 1"):
        llm.generate([ids(3), ids(4)], [GREEDY])
    assert llm.generate([]) == []


def test_a_thousand_prompts_go_through_a_queue_of_three(llm, module):
    outputs = llm.generate([ids(1 + index % 3) for index in range(1000)], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    wanted = [greedy(module, ids(length), 2) for length in (1, 2, 3)]
    assert [output.outputs[0].token_ids for output in outputs] == [wanted[index % 3] for index in range(1000)]


def test_submit_refuses_when_the_queue_is_full_and_loses_nobody(llm):
    ended, refused = [], None
    condition = threading.Condition()

    def sink(output: ad_core.llm.RequestOutput) -> None:
        if output.finished:
            with condition:
                ended.append(output.request_id)
                condition.notify()

    accepted = []
    for index in range(200):
        try:
            accepted.append(llm.submit(ids(20, seed=index), GREEDY, sink=sink))
        except errors.QueueFull as full:
            refused = full
    assert refused is not None
    assert refused.limit == 3
    assert refused.size >= 3
    with condition:
        assert condition.wait_for(lambda: len(ended) == len(accepted), timeout=60)
    assert sorted(ended) == sorted(accepted)


def test_a_stream_that_is_aborted_ends_with_abort(llm):
    outputs = []
    for output in llm.stream(ids(9), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True), request_id="mine"):
        outputs.append(output)
        if len(outputs) == 3:
            llm.abort("mine")
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) < 50


def test_a_stream_that_is_dropped_frees_its_pages(llm):
    for _ in llm.stream(ids(9), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)):
        break


def test_coroutines_answer_side_by_side_and_a_cancelled_one_hurts_nobody(llm, module):
    async def everything() -> tuple[list[int], list[int]]:
        async def streamed() -> list[int]:
            last = None
            async for output in llm.astream(ids(7), GREEDY):
                last = output
            assert last is not None
            return last.outputs[0].token_ids

        doomed = asyncio.create_task(llm.agenerate(ids(11), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)))
        pair = asyncio.gather(streamed(), llm.agenerate(ids(9), GREEDY))
        await asyncio.sleep(0)
        doomed.cancel()
        first, second = await pair
        return first, second.outputs[0].token_ids

    assert asyncio.run(everything()) == (greedy(module, ids(7), 8), greedy(module, ids(9), 8))


def test_closing_while_requests_run_ends_them_and_refuses_more(module):
    engine = LLM(module, **SMALL)
    stream = engine.stream(ids(9), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
    next(stream)
    engine.close()
    engine.close()
    last = list(stream)[-1]
    assert last.outputs[0].finish_reason == "abort"
    with pytest.raises(errors.EngineClosedError):
        engine.generate(ids(3), GREEDY)


def test_two_engines_in_one_process_do_not_meet(llm, module):
    other = tiny("llama", seed=7)
    with LLM(other, **SMALL) as second:
        answers = [engine.generate(ids(9), GREEDY)[0].outputs[0].token_ids for engine in (llm, second)]
    assert answers == [greedy(module, ids(9), 8), greedy(other, ids(9), 8)]


# -- models that cannot be opened -------------------------------------------------------------------------------------


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(errors.UnknownModelError, match="nothing is downloaded"):
        LLM("some-hub/some-model")
    with pytest.raises(errors.ModelError, match="config.json"):
        LLM(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of-the-future"}')
    with pytest.raises(errors.ModelError, match="of-the-future"):
        LLM(tmp_path)
