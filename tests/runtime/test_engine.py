"""The engine: what it refuses, how requests end, and that none hurts another."""

from __future__ import annotations

import pytest
import torch

from ad_core.api.errors import EngineClosedError, InvalidRequestError, PromptTooLongError, QueueFull, RequestFailedError
from ad_core.runtime.params import SamplingParams

from .toy import Letters, ToyExecutor, drain, letters, reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ("text", "not a flat sequence of token ids"),
        ([[1, 2]], "not a flat sequence of token ids"),
        ([[1], [2, 3]], "not a flat sequence of token ids"),
        ([1.5], "not a flat sequence of token ids"),
        ([True], "not a flat sequence of token ids"),
        ([1, 32], "token id 32 is outside of the vocabulary"),
        ([1, -1], "token id -1 is outside of the vocabulary"),
        ([2**70], "not a flat sequence of token ids"),
    ],
)
def test_a_prompt_that_is_none_is_refused_and_changes_nothing(prompt, message):
    engine = ToyExecutor().engine()
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(prompt)
    assert not engine.has_work
    engine.cache.audit()


def test_prompts_may_be_tensors_and_arrays():
    model = ToyExecutor()
    engine = model.engine()
    for prompt in (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).numpy(), (1, 2, 3)):
        engine.submit(prompt, GREEDY)
    answers = [output.outputs[0].token_ids for output in drain(engine).values()]
    assert answers == [reference(model, [1, 2, 3], GREEDY, max_length=128)] * 3


@pytest.mark.parametrize(
    ("options", "limit"), [({"max_model_len": 20}, "the model's 20"), ({"num_pages": 6, "page_size": 4}, "the cache's 20")]
)
def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(options, limit):
    engine = ToyExecutor(**options).engine()
    with pytest.raises(PromptTooLongError, match=f"the prompt has 21 tokens, more than {limit}"):
        engine.submit([1] * 21)
    engine.submit([1] * 20, GREEDY)
    (output,) = drain(engine).values()
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("length", [])


def test_a_stop_id_outside_of_the_vocabulary_is_refused():
    with pytest.raises(InvalidRequestError, match="token id 99"):
        ToyExecutor().engine().submit([1], SamplingParams(stop_token_ids=[99]))


def test_a_full_queue_says_how_full_and_recovers():
    model = ToyExecutor()
    engine = model.engine(max_queued_requests=3)
    for _ in range(3):
        engine.submit([1, 2], GREEDY)
    with pytest.raises(QueueFull) as refusal:
        engine.submit([1, 2], GREEDY)
    assert (refusal.value.limit, refusal.value.size) == (3, 3)
    engine.step()
    engine.submit([1, 2], GREEDY)
    assert len(drain(engine)) == 4


def test_an_id_may_be_used_again_only_when_its_request_has_ended():
    engine = ToyExecutor().engine()
    engine.submit([1, 2], GREEDY, "mine")
    with pytest.raises(InvalidRequestError, match="'mine'"):
        engine.submit([1, 2], GREEDY, "mine")
    drain(engine)
    assert engine.submit([1, 2], GREEDY, "mine") == "mine"


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_an_answer_has_max_tokens(count):
    model = ToyExecutor()
    engine = model.engine()
    params = SamplingParams(temperature=0.0, max_tokens=count)
    engine.submit([3, 1, 4], params)
    (output,) = drain(engine, model).values()
    assert output.finished
    assert output.outputs[0].token_ids == reference(model, [3, 1, 4], params, max_length=128)
    assert len(output.outputs[0].token_ids) == count
    assert output.outputs[0].finish_reason == "length"
    assert output.error is None


def test_without_max_tokens_an_answer_goes_to_the_models_length():
    model = ToyExecutor(max_model_len=30)
    engine = model.engine()
    engine.submit([3, 1, 4], SamplingParams(temperature=0.0, max_tokens=None))
    (output,) = drain(engine).values()
    assert len(output.outputs[0].token_ids) == 27
    assert output.outputs[0].finish_reason == "length"


def test_eos_and_stop_ids_end_an_answer_unless_ignored_or_too_early():
    model = ToyExecutor()
    free = reference(model, [2, 7], SamplingParams(temperature=0.0, max_tokens=20), max_length=128)
    eos = free[4]
    first = free.index(eos)
    cases = [
        ({}, [eos], free[: first + 1], "stop", eos),
        ({"ignore_eos": True}, [eos], free, "length", None),
        ({"stop_token_ids": [free[2]]}, [], free[: free.index(free[2]) + 1], "stop", free[2]),
        ({"stop_token_ids": [eos], "ignore_eos": True}, [eos], free[: first + 1], "stop", eos),
    ]
    for options, eos_ids, tokens, reason, stop_reason in cases:
        engine = model.engine(eos_token_ids=eos_ids)
        engine.submit([2, 7], SamplingParams(temperature=0.0, max_tokens=20, **options))
        (output,) = drain(engine).values()
        assert (output.outputs[0].token_ids, output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
            tokens,
            reason,
            stop_reason,
        )
    engine = model.engine(eos_token_ids=[eos])
    engine.submit([2, 7], SamplingParams(temperature=0.0, max_tokens=20, min_tokens=12))
    (output,) = drain(engine).values()
    assert eos not in output.outputs[0].token_ids[:12]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_is_never_shown_in_part(stream):
    model = ToyExecutor(vocab_size=26)
    free = letters(reference(model, [2, 7], SamplingParams(temperature=0.0, max_tokens=20), max_length=128))
    stop = free[5:8]
    place = free.index(stop)
    for include in (False, True):
        engine = model.engine(tokenizer=Letters())
        params = SamplingParams(temperature=0.0, max_tokens=20, stop=["zzzz", stop], include_stop_str=include)
        engine.submit([2, 7], params, "r", stream=stream, prompt="ch")
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        last = outputs[-1]
        assert last.text == free[: place + 3 * include]
        assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason, last.prompt) == ("stop", stop, "ch")
        assert letters(last.outputs[0].token_ids) == free[: place + 3]
        assert "".join(output.delta for output in outputs) == last.text
        assert (len(outputs) > 1) == stream


def test_the_text_of_a_stop_token_is_left_out_unless_asked_for():
    model = ToyExecutor(vocab_size=26)
    free = reference(model, [2, 7], SamplingParams(temperature=0.0, max_tokens=20), max_length=128)
    end = free.index(free[4])
    for include in (False, True):
        engine = model.engine(tokenizer=Letters(), eos_token_ids=[free[4]])
        engine.submit([2, 7], SamplingParams(temperature=0.0, max_tokens=20, include_stop_str=include))
        (output,) = drain(engine).values()
        assert output.text == letters(free[: end + include])
        assert output.outputs[0].token_ids == free[: end + 1]


def test_without_a_tokenizer_there_are_ids_and_no_text():
    engine = ToyExecutor().engine()
    engine.submit([2, 7], SamplingParams(temperature=0.0, max_tokens=3, stop="a"))
    (output,) = drain(engine).values()
    assert (output.text, len(output.outputs[0].token_ids)) == ("", 3)


def test_streamed_deltas_add_up_and_earlier_outputs_do_not_change():
    model = ToyExecutor(vocab_size=26)
    engine = model.engine(tokenizer=Letters())
    engine.submit([2, 7], SamplingParams(temperature=1.0, max_tokens=9, n=2, seed=3, logprobs=1), stream=True)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    snapshots = [[(completion.text, list(completion.token_ids)) for completion in output.outputs] for output in outputs]
    for index in range(2):
        assert "".join(output.outputs[index].delta for output in outputs) == outputs[-1].outputs[index].text
        assert sum(output.outputs[index].num_new_tokens for output in outputs) == 9
        lengths = [len(snapshot[index][1]) for snapshot in snapshots]
        assert lengths == sorted(lengths)
        assert len(outputs[-1].outputs[index].logprobs) == 9
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_an_abort_ends_a_request_at_once_wherever_it_is():
    model = ToyExecutor(max_sequences=1, vocab_size=26)
    engine = model.engine(tokenizer=Letters())
    for name in ("running", "waiting", "kept"):
        engine.submit([2, 7], SamplingParams(temperature=0.0, max_tokens=8), name)
    for _ in range(3):
        engine.step()
    assert engine.abort("running")
    assert engine.abort("waiting")
    assert not engine.abort("running")
    assert not engine.abort("nobody")
    engine.cache.audit()
    assert engine.cache.groups[0].num_owned == 0
    outputs = drain(engine, model)
    assert {name: output.outputs[0].finish_reason for name, output in outputs.items()} == {
        "running": "abort",
        "waiting": "abort",
        "kept": "length",
    }
    assert len(outputs["running"].outputs[0].token_ids) == 3
    assert outputs["running"].text == outputs["kept"].text[:3]


def test_samples_of_one_prompt_differ_repeat_with_the_seed_and_share_the_prompt():
    model = ToyExecutor(max_sequences=3)
    params = SamplingParams(seed=5, n=5, max_tokens=8)
    answers = []
    for prefix in (True, False):
        engine = model.engine(prefix_cache=prefix)
        engine.submit([1, 2, 3, 4, 5, 6, 7, 8, 9], params)
        (output,) = drain(engine, model).values()
        answers.append([completion.token_ids for completion in output.outputs])
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3, 4]
        assert engine.stats.reused_tokens >= 8 * 2
    assert (
        answers[0]
        == answers[1]
        == [reference(model, [1, 2, 3, 4, 5, 6, 7, 8, 9], params, sample=index, max_length=128) for index in range(5)]
    )
    assert len({tuple(answer) for answer in answers[0]}) == 5


# -- the same answer everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 5, "frequency_penalty": 0.5}, {"top_p": 0.8, "logprobs": 2}]
)
def test_a_seed_gives_the_same_answer_in_any_batch_chunking_and_memory(options):
    prompts = [[(7 * row + column) % 32 for column in range(3 + 5 * row)] for row in range(6)]
    every = []
    for shape in (
        {"max_sequences": 1},
        {"max_sequences": 6, "max_tokens": 64},
        {"max_sequences": 6, "max_tokens": 1},
        {"max_sequences": 5, "max_tokens": 7, "page_size": 1, "num_pages": 60},
        {"max_sequences": 6, "max_tokens": 16, "num_pages": 13},
    ):
        model = ToyExecutor(**shape)
        engine = model.engine()
        for seed, prompt in enumerate(prompts):
            engine.submit(prompt, SamplingParams(seed=seed, max_tokens=12, **options), f"{seed}")
        outputs = drain(engine, model)
        every.append([outputs[f"{seed}"].outputs[0].token_ids for seed in range(6)])
        if shape.get("num_pages") == 13:
            assert engine.stats.preemptions > 0
    assert all(answers == every[0] for answers in every)


def test_requests_without_a_seed_differ_and_an_engine_with_one_repeats_itself():
    def run(seed: int | None) -> list[list[int]]:
        engine = ToyExecutor().engine(seed=seed)
        for _ in range(3):
            engine.submit([1, 2, 3], SamplingParams(max_tokens=8))
        return [output.outputs[0].token_ids for _, output in sorted(drain(engine).items())]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)
    assert len({tuple(answer) for answer in run(1)}) == 3


def test_a_second_turn_reuses_the_first_and_says_how_much():
    model = ToyExecutor()
    engine = model.engine()
    prompt = list(range(10))
    engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=7))
    (first,) = drain(engine, model).values()
    assert first.reused.length == 0
    turn = [*prompt, *first.outputs[0].token_ids, 3, 1]
    engine.submit(turn, GREEDY)
    (second,) = drain(engine, model).values()
    assert second.reused.length == 16  # all full pages of what was computed
    assert second.outputs[0].token_ids == reference(model, turn, GREEDY, max_length=128)


def test_pages_of_a_windowed_group_come_back_while_a_long_answer_runs():
    model = ToyExecutor(windows=(None, 6), max_model_len=128, num_pages=[40, 6])
    engine = model.engine()
    params = SamplingParams(temperature=0.0, max_tokens=100)
    engine.submit([1, 2, 3], params)
    most = 0
    while engine.has_work:
        outputs = engine.step()
        engine.cache.audit()
        model.poison_free(engine)
        most = max(most, engine.cache.groups[1].num_owned)
    assert most <= 3
    assert outputs[0].outputs[0].token_ids == reference(model, [1, 2, 3], params, max_length=128)


def test_a_thousand_requests_at_once_all_end_and_nothing_is_left():
    model = ToyExecutor(num_pages=33, max_sequences=8, max_tokens=24)
    engine = model.engine()
    params = SamplingParams(temperature=0.0, max_tokens=2)
    for index in range(1000):
        engine.submit([index % 32, index // 32], params, f"{index}")
    assert engine.num_waiting == 1000
    outputs = drain_fast(engine)
    assert len(outputs) == 1000
    assert {output.outputs[0].finish_reason for output in outputs.values()} == {"length"}
    for index in (0, 499, 999):
        assert outputs[f"{index}"].outputs[0].token_ids == reference(model, [index % 32, index // 32], params, max_length=128)
    engine.cache.audit()
    assert engine.cache.groups[0].num_owned == 0


def drain_fast(engine):
    done = {}
    while engine.has_work:
        done.update((output.request_id, output) for output in engine.step())
    return done


def test_generate_feeds_at_the_queues_pace():
    model = ToyExecutor()
    engine = model.engine(max_queued_requests=2)
    requests = [([index % 32, 1], GREEDY) for index in range(40)]
    assert len(list(engine.generate(requests))) == 40
    run = engine.generate(requests)
    next(run)
    run.close()  # left early: what was begun is aborted
    assert {output.outputs[0].finish_reason for output in drain(engine).values()} <= {"abort", "length"}
    assert engine.cache.groups[0].num_owned == 0


# -- failures ---------------------------------------------------------------------------------------------------------


class Poisoned(ToyExecutor):
    """Gives NaN for the row of one lane at one step."""

    lane, at = 2, 3

    def step(self, rows):
        logits = super().step(rows)
        sampled = [row.lane for row in rows if row.num_outputs]
        if len(self.steps) == self.at and self.lane in sampled:
            logits[sampled.index(self.lane), 5] = float("nan")
        return logits


@pytest.mark.parametrize("n", [1, 2])
def test_logits_that_are_no_numbers_end_their_own_request_only(n):
    model = Poisoned(max_sequences=6)
    engine = model.engine()
    params = SamplingParams(seed=1, max_tokens=6, n=n)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for name, prompt in zip("abc", prompts, strict=True):
        engine.submit(prompt, params, name)
    outputs = drain(engine, model)
    (failed,) = [output for output in outputs.values() if output.error]
    assert isinstance(failed.error, RequestFailedError)
    assert "not finite" in str(failed.error)
    assert {completion.finish_reason for completion in failed.outputs} == {"error"}
    for name, prompt in zip("abc", prompts, strict=True):
        if outputs[name] is not failed:
            expected = [reference(model, prompt, params, sample=index, max_length=128) for index in range(n)]
            assert [completion.token_ids for completion in outputs[name].outputs] == expected
    assert engine.cache.groups[0].num_owned == 0


def test_what_a_failed_request_computed_is_not_reused():
    model = Poisoned(max_sequences=2)
    model.lane, model.at = 1, 2
    engine = model.engine()
    prompt = list(range(12))
    engine.submit(prompt, GREEDY)
    drain(engine, model)
    engine.submit(prompt, GREEDY)
    (output,) = drain(engine, model).values()
    assert output.reused.length == 0
    assert output.error is None


def test_a_tokenizer_that_raises_fails_its_own_request_only():
    class Broken(Letters):
        def decode(self, ids, **options):
            if 7 in ids:
                raise ValueError("no such letter")
            return super().decode(ids, **options)

    model = ToyExecutor(vocab_size=26)
    engine = model.engine(tokenizer=Broken())
    for stream in (True, False):
        engine.submit([1, 7], GREEDY, "bad", stream=stream)
        engine.submit([1, 3], SamplingParams(temperature=0.0, max_tokens=1), "good", stream=stream)
        outputs = drain(engine, model)
        assert isinstance(outputs["bad"].error, RequestFailedError)
        assert "no such letter" in str(outputs["bad"].error)
        assert outputs["bad"].outputs[0].finish_reason == "error"
        assert outputs["good"].error is None
        assert outputs["good"].text
    engine.submit([1, 7], GREEDY, "aborted")
    engine.step()
    engine.abort("aborted")
    assert drain(engine)["aborted"].outputs[0].finish_reason == "error"


class Evil(ToyExecutor):
    """Breaks down in its fourth step."""

    def step(self, rows):
        if len(self.steps) == 3:
            raise RuntimeError("the device is gone")
        return super().step(rows)


def test_a_broken_step_ends_every_request_and_the_engine_refuses_with_the_cause():
    model = Evil(max_sequences=2)
    engine = model.engine()
    for index in range(5):
        engine.submit([index, 1], SamplingParams(max_tokens=9, n=2), f"{index}", stream=True)
    ended = []
    while engine.failure is None:
        ended += [output for output in engine.step() if output.finished]
    assert sorted(output.request_id for output in ended) == ["0", "1", "2", "3", "4"]
    for output in ended:
        assert isinstance(output.error, EngineClosedError)
        assert "the device is gone" in str(output.error)
        assert {completion.finish_reason for completion in output.outputs} == {"error"}
    for call in (lambda: engine.submit([1, 2]), engine.step):
        with pytest.raises(EngineClosedError, match="the device is gone") as refusal:
            call()
        assert isinstance(refusal.value.__cause__, RuntimeError)
    engine.cache.audit()
    assert engine.cache.groups[0].num_owned == 0
    assert engine.close() == []


def test_an_interrupt_in_a_step_closes_the_engine_and_goes_on_to_the_caller():
    class Interrupted(ToyExecutor):
        def step(self, rows):
            raise KeyboardInterrupt

    engine = Interrupted().engine()
    engine.submit([1, 2])
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(EngineClosedError):
        engine.submit([1, 2])


def test_close_aborts_what_is_under_way_and_refuses_the_rest():
    engine = ToyExecutor().engine()
    engine.submit([1, 2], GREEDY)
    engine.step()
    (output,) = engine.close()
    assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")
    assert engine.close() == []
    with pytest.raises(EngineClosedError, match="was closed"):
        engine.submit([1, 2])
    assert engine.cache.groups[0].num_owned == 0


def test_statistics_and_times_add_up():
    model = ToyExecutor()
    engine = model.engine()
    engine.submit([1, 2, 3, 4, 5], GREEDY)
    (output,) = drain(engine).values()
    assert (engine.stats.steps, engine.stats.sampled_tokens, engine.stats.computed_tokens) == (6, 6, 10)
    assert engine.stats.finished == {"length": 1}
    times = output.metrics
    assert times.arrived <= times.started <= times.first_token <= times.finished
