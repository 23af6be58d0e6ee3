"""One engine, many callers: threads, coroutines, and every way to leave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from ad_core.api.errors import EngineClosedError, InvalidRequestError, QueueFull
from ad_core.runtime.loop import EngineLoop
from ad_core.runtime.params import SamplingParams

from .toy import Letters, ToyExecutor, letters, reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
PROMPTS = [[index % 32, 3, index // 32] for index in range(24)]


class Slow(ToyExecutor):
    """Waits before each step for `gate`, or breaks when told to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False

    def step(self, rows):
        self.gate.wait(10)
        if self.broken:
            raise RuntimeError("the device is gone")
        return super().step(rows)


@pytest.fixture
def make():
    loops = []

    def start(model: ToyExecutor, **options) -> EngineLoop:
        loops.append(EngineLoop(model.engine(**options)))
        return loops[-1]

    yield start
    for loop in loops:
        loop.close()
        assert not loop._worker.is_alive


def expected(model: ToyExecutor, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    return reference(model, prompt, params, max_length=128)


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


def test_generate_answers_in_order_through_a_queue_that_is_far_too_small(make):
    model = ToyExecutor()
    loop = make(model, max_queued_requests=2)
    seen = []
    outputs = loop.generate([(prompt, GREEDY) for prompt in PROMPTS], prompts=[str(prompt) for prompt in PROMPTS], on_finished=seen.append)
    assert [output.prompt for output in outputs] == [str(prompt) for prompt in PROMPTS]
    assert [output.outputs[0].token_ids for output in outputs] == [expected(model, prompt) for prompt in PROMPTS]
    assert len(seen) == len(PROMPTS)


def test_many_threads_get_their_own_answers(make):
    model = ToyExecutor()
    loop = make(model)
    answers: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        outputs = list(loop.stream(PROMPTS[index], GREEDY))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        answers[index] = outputs[-1].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert answers == {index: expected(model, PROMPTS[index]) for index in range(8)}


def test_coroutines_stream_and_generate_side_by_side(make):
    model = ToyExecutor()
    loop = make(model)

    async def stream(prompt):
        total, last = 0, None
        async for output in loop.astream(prompt, GREEDY):
            total += output.outputs[0].num_new_tokens
            last = output
        assert total == len(last.outputs[0].token_ids)
        return last

    async def main():
        return await asyncio.gather(
            *(stream(prompt) for prompt in PROMPTS[:6]), *(loop.agenerate(prompt, GREEDY) for prompt in PROMPTS[6:12])
        )

    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == [expected(model, prompt) for prompt in PROMPTS[:12]]


def test_a_full_queue_refuses_and_does_not_block(make):
    model = Slow(max_sequences=1)
    loop = make(model, max_queued_requests=2)
    model.gate.clear()
    done = []
    loop.submit(PROMPTS[0], GREEDY, done.append)
    wait_for(lambda: loop.engine.num_running == 1)
    for prompt in PROMPTS[1:3]:
        loop.submit(prompt, GREEDY, done.append)
    with pytest.raises(QueueFull) as refusal:
        loop.submit(PROMPTS[3], GREEDY, done.append)
    assert (refusal.value.limit, refusal.value.size) == (2, 2)
    with pytest.raises(QueueFull):
        asyncio.run(loop.agenerate(PROMPTS[3], GREEDY))
    with pytest.raises(QueueFull):
        next(loop.stream(PROMPTS[3], GREEDY))
    model.gate.set()
    wait_for(lambda: len(done) == 3)


def test_what_is_wrong_is_raised_where_it_is_asked(make):
    loop = make(ToyExecutor())
    with pytest.raises(InvalidRequestError, match="empty"):
        loop.submit([], GREEDY, print)
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        asyncio.run(loop.agenerate([99]))
    with pytest.raises(InvalidRequestError, match="empty"):
        loop.generate([([1, 2], GREEDY), ([], GREEDY)])
    wait_for(lambda: not loop.engine.has_work)


def test_the_same_id_twice_is_refused(make):
    model = Slow()
    loop = make(model)
    model.gate.clear()
    loop.submit([1], GREEDY, lambda output: None, "mine")
    with pytest.raises(InvalidRequestError, match="'mine'"):
        loop.submit([1], GREEDY, lambda output: None, "mine")
    model.gate.set()


def test_a_reader_who_leaves_frees_everything(make):
    model = ToyExecutor()
    loop = make(model)
    long = SamplingParams(temperature=0.0, max_tokens=None)
    for output in loop.stream([1, 2], long):
        assert not output.finished
        break
    wait_for(lambda: not loop.engine.has_work)

    async def leave():
        async for _ in loop.astream([1, 2], long):
            break
        task = asyncio.create_task(loop.agenerate([1, 2], long))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    wait_for(lambda: not loop.engine.has_work)
    assert loop.engine.stats.finished["abort"] == 3
    assert loop.engine.cache.groups[0].num_owned == 0


def test_abort_in_mid_stream_gives_the_last_output(make):
    loop = make(ToyExecutor())
    outputs = []
    for output in loop.stream([1, 2], SamplingParams(temperature=0.0, max_tokens=None), "mine"):
        outputs.append(output)
        if len(outputs) == 2:
            loop.abort("mine")
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert len(outputs[-1].outputs[0].token_ids) < 126
    loop.abort("mine")
    loop.abort("nobody")


def test_a_slow_reader_gets_several_steps_at_once_and_loses_nothing(make):
    model = ToyExecutor(vocab_size=26)
    loop = make(model, tokenizer=Letters())
    params = SamplingParams(temperature=0.0, max_tokens=50)
    stream = loop.stream([1, 2], params)
    outputs = [next(stream)]
    wait_for(lambda: not loop.engine.has_work)
    outputs += list(stream)
    assert len(outputs) <= 3
    assert sum(output.outputs[0].num_new_tokens for output in outputs) == 50
    assert outputs[-1].outputs[0].token_ids == expected(model, [1, 2], params)
    assert "".join(output.delta for output in outputs) == outputs[-1].text == letters(expected(model, [1, 2], params))


def test_a_sink_that_raises_loses_its_own_request_only(make):
    model = ToyExecutor()
    loop = make(model)

    def bad(output):
        raise ValueError("gone")

    loop.submit([1, 2], SamplingParams(temperature=0.0, max_tokens=None), bad, stream=True)
    (output,) = loop.generate([([3, 4], GREEDY)])
    assert output.outputs[0].token_ids == expected(model, [3, 4])
    wait_for(lambda: loop.engine.stats.finished["abort"] == 1)
    assert loop.engine.cache.groups[0].num_owned == 0


def test_a_broken_step_fails_everybody_and_nothing_hangs(make):
    model = Slow(max_sequences=2)
    loop = make(model)
    model.gate.clear()
    done = []
    for prompt in PROMPTS[:5]:
        loop.submit(prompt, SamplingParams(temperature=0.0, n=2), done.append)
    model.broken = True
    model.gate.set()
    wait_for(lambda: len(done) == 5)
    for output in done:
        assert isinstance(output.error, EngineClosedError)
        assert "the device is gone" in str(output.error)
        assert [completion.finish_reason for completion in output.outputs] == ["error", "error"]
    wait_for(lambda: not loop._worker.is_alive)
    for ask in (lambda: loop.submit([1], GREEDY, print), lambda: loop.generate([([1], GREEDY)]), lambda: asyncio.run(loop.agenerate([1]))):
        with pytest.raises(EngineClosedError, match="the device is gone"):
            ask()


def test_a_request_that_reaches_the_inbox_of_a_dying_engine_is_told(make):
    model = Slow()
    loop = make(model)
    model.gate.clear()
    done = []
    loop.submit([1, 2], GREEDY, done.append)
    wait_for(lambda: loop.engine.num_running == 1)
    loop.submit([3, 4], SamplingParams(n=3), done.append, "late")
    model.broken = True
    model.gate.set()
    wait_for(lambda: len(done) == 2)
    (late,) = [output for output in done if output.request_id == "late"]
    assert isinstance(late.error, EngineClosedError)
    assert (late.prompt_token_ids, len(late.outputs)) == ([3, 4], 3)


def test_close_aborts_joins_and_may_be_called_twice(make):
    model = Slow()
    loop = make(model)
    model.gate.clear()
    done = []
    loop.submit([1, 2], SamplingParams(max_tokens=None), done.append)
    wait_for(lambda: loop.engine.num_running == 1)
    loop.submit([3, 4], GREEDY, done.append)
    threading.Timer(0.05, model.gate.set).start()
    loop.close()
    loop.close()
    assert not loop._worker.is_alive
    assert [output.outputs[0].finish_reason for output in done] == ["abort", "abort"]
    with pytest.raises(EngineClosedError, match="was closed"):
        loop.submit([1], GREEDY, print)


def test_waiting_for_the_queue_ends_when_the_engine_does(make):
    model = Slow(max_sequences=1)
    loop = make(model, max_queued_requests=1)
    model.gate.clear()
    raised = []

    def ask() -> None:
        with pytest.raises(EngineClosedError):
            loop.generate([(prompt, GREEDY) for prompt in PROMPTS])
        raised.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: loop.engine.num_running == 1)
    threading.Timer(0.05, model.gate.set).start()
    loop.close()
    thread.join(10)
    assert raised


def test_an_interrupted_generate_aborts_what_it_began(make):
    model = ToyExecutor(max_sequences=1)
    loop = make(model)

    def interrupt(output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.generate([(prompt, GREEDY) for prompt in PROMPTS], on_finished=interrupt)
    wait_for(lambda: not loop.engine.has_work)
    assert loop.engine.stats.finished["abort"] > 0


def test_dropping_the_last_reference_ends_the_thread():
    loop = EngineLoop(ToyExecutor().engine())
    worker, dropped = loop._worker, weakref.ref(loop)
    loop.generate([([1, 2], GREEDY)])
    del loop
    gc.collect()
    assert dropped() is None
    wait_for(lambda: not worker.is_alive)


def test_two_engines_in_one_process_do_not_know_each_other(make):
    first, second = ToyExecutor(), Slow(vocab_size=20)
    one, two = make(first), make(second)
    second.broken = True
    (failed,) = two.generate([([1, 2], GREEDY)])
    assert isinstance(failed.error, EngineClosedError)
    (answer,) = one.generate([([1, 2], GREEDY)])
    assert answer.outputs[0].token_ids == expected(first, [1, 2])


def test_an_idle_loop_sleeps(make):
    loop = make(ToyExecutor())
    loop.generate([([1, 2], GREEDY)])
    steps = loop.engine.stats.steps
    before = time.process_time()
    time.sleep(0.3)
    assert loop.engine.stats.steps == steps
    assert time.process_time() - before < 0.15
