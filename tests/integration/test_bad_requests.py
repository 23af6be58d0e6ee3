"""What people send that cannot be served: each is refused with what to do, and the engine goes on as if nothing had been."""

from __future__ import annotations

import threading

import pytest
import torch

from ad_core import LLM, SamplingParams
from ad_core.api.errors import InvalidRequestError, PromptTooLongError, QueueFull, TokenizerMissingError

from ..zoo_models import ids, tiny
from .conftest import OPTIONS

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

NO_PROMPTS = {
    "empty text": ("", "the prompt is empty"),
    "no ids": ([[]], "the prompt is empty"),
    "no ids, among others": ([[5], []], "the prompt is empty"),
    "nothing": (None, "a prompt cannot be a NoneType"),
    "a number": (5, "a prompt cannot be a int"),
    "bytes": (b"abc", "a prompt cannot be a bytes"),
    "a bare message": ({"role": "user", "content": "x"}, "a prompt cannot be a dict"),
    "fractions": ([[1.5, 2.5]], "a prompt cannot be a list with a float in it"),
    "truths": ([[True]], "a prompt cannot be a list with a bool in it"),
    "two levels": ([[[5]]], "a prompt cannot be a list with a list in it"),
    "a matrix": (torch.ones(2, 3, dtype=torch.int64), "a prompt cannot be a list with a list in it"),
    "an id that is too large": ([5, 128], "the prompt holds the token id 128\n.*ids 0 to 127"),
    "an id that is huge": ([2**70], "the prompt holds the token id 1180591620717411303424"),
    "an id below zero": ([-1], "the prompt holds the token id -1"),
}


@pytest.mark.parametrize(("prompt", "message"), NO_PROMPTS.values(), ids=NO_PROMPTS)
def test_what_is_no_prompt_is_refused(llm, prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize("prompt", ["text", [{"role": "user", "content": "text"}]], ids=["text", "messages"])
def test_text_needs_a_tokenizer_and_ids_do_not(llm, prompt):
    assert llm.tokenizer is None
    with pytest.raises(TokenizerMissingError, match="give token ids, or LLM"):
        llm.generate(prompt, GREEDY)
    (output,) = llm.generate(ids(5), GREEDY)
    assert (len(output.outputs[0].token_ids), output.text, output.prompt) == (4, "", None)


def test_stop_strings_need_a_tokenizer_too(llm):
    with pytest.raises(TokenizerMissingError, match="give stop_token_ids"):
        llm.generate(ids(5), SamplingParams(stop=["x"]))


def test_ids_come_in_many_shapes(llm):
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    for prompt in ((5, 6, 7), range(5, 8), torch.tensor([5, 6, 7]), [torch.tensor([5, 6, 7])], [[5, 6, 7]]):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == expected
    assert llm.generate([], GREEDY) == []


def test_a_prompt_longer_than_the_model_is_refused_with_both_numbers(llm):
    with pytest.raises(PromptTooLongError, match="the prompt has 129 tokens, more than the model's 128\n.*shorten the prompt"):
        llm.generate([ids(5), ids(129)], GREEDY)
    (output,) = llm.generate(ids(128), GREEDY)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "length")
    (output,) = llm.generate(ids(127), SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (1, "length")


def test_a_prompt_longer_than_the_cache_is_refused_with_both_numbers():
    # 9 pages of 4 tokens, one of them null, at 512 bytes a token
    with LLM(tiny("llama"), memory=9 * 4 * 512, verify=False, **OPTIONS) as llm:
        assert llm.max_length == 32
        with pytest.raises(PromptTooLongError, match="the prompt has 33 tokens, more than the cache's 32\n.*raise `memory`"):
            llm.generate(ids(33), GREEDY)
        (output,) = llm.generate(ids(20), SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 12
        llm._engine.cache.audit()


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(llm, count):
    (output,) = llm.generate(ids(9), SamplingParams(max_tokens=count, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == count
    assert output.outputs[0].finish_reason == "length"
    streamed = list(llm.stream(ids(9), SamplingParams(max_tokens=count, ignore_eos=True)))
    assert [output.finished for output in streamed] == [True]


BAD_VALUES = {
    "temperature": [-1, float("nan"), "hot", True],
    "top_p": [0, 1.5],
    "top_k": [-1, 2.5],
    "min_p": [-0.1, 2],
    "n": [0],
    "max_tokens": [-1, 2.5],
    "stop": [[""], 5],
    "stop_token_ids": [[-1], [128]],
    "logprobs": [-1, 1000],
    "seed": [2**65],
    "repetition_penalty": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_a_sampling_value_that_makes_no_sense_is_refused(llm, name, value):
    with pytest.raises(InvalidRequestError, match=name if value != [128] else "token id 128 is outside of the vocabulary"):
        llm.generate(ids(5), SamplingParams(**{name: value}))


def test_a_mistyped_sampling_parameter_is_named_with_the_nearest(llm):
    with pytest.raises(InvalidRequestError, match="unknown sampling parameter `temprature`\n.*did you mean `temperature`"):
        llm.generate(ids(5), SamplingParams(temprature=0.5))


def test_parameters_must_be_sampling_parameters_one_or_as_many_as_prompts(llm):
    for wrong in ({"temperature": 0}, "greedy", [{"temperature": 0}]):
        with pytest.raises(InvalidRequestError, match="sampling parameters cannot be a (dict|str)"):
            llm.generate(ids(5), wrong)
    with pytest.raises(InvalidRequestError, match="there are 1 prompts and 2 sampling parameters"):
        llm.generate(ids(5), [GREEDY, GREEDY])
    with pytest.raises(InvalidRequestError, match="sampling parameters cannot be a dict"):
        llm.stream(ids(5), {"temperature": 0})


def test_a_thousand_prompts_at_once_are_all_answered(llm):
    prompts = [ids(1 + index % 7, seed=index) for index in range(1000)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(len(output.outputs[0].token_ids) == 2 and output.error is None for output in outputs)


def test_a_full_queue_refuses_with_limit_and_size_and_generate_waits_for_it(llm):
    ended, lock, accepted = [], threading.Condition(), []

    def sink(output):
        with lock:
            if output.finished:
                ended.append(output)
            lock.notify_all()

    def flood():
        for index in range(1000):
            accepted.append(llm.submit(ids(9, seed=index), long, sink=sink))

    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    with pytest.raises(QueueFull, match="16 requests wait, the limit is 16\n.*max_queued_requests") as refusal:
        flood()
    assert (refusal.value.limit, refusal.value.size) == (16, 16)
    assert len(llm.generate([ids(3)] * 20, GREEDY)) == 20
    with lock:
        assert lock.wait_for(lambda: len(ended) == len(accepted), 60)
    assert {output.outputs[0].finish_reason for output in ended} == {"length"}
    assert sorted(output.request_id for output in ended) == sorted(accepted)


def test_one_id_is_one_request(llm):
    sink, ended = threading.Event(), threading.Event()
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    llm.submit(ids(9), long, request_id="mine", sink=lambda output: output.finished and ended.set())
    with pytest.raises(InvalidRequestError, match="a request with the id 'mine' is running"):
        llm.submit(ids(9), GREEDY, request_id="mine", sink=lambda output: sink.set())
    assert ended.wait(60)
    assert not sink.is_set()
