"""A model of every mixer in one engine: pages of two windows and states of five kinds, under any load, answer as full recompute does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ad_core.api.errors import PromptTooLongError
from ad_core.config import make_config
from ad_core.pipeline import Built, build
from ad_core.runtime.engine import Engine
from ad_core.runtime.outputs import RequestOutput
from ad_core.runtime.params import SamplingParams

from .hybrid import OPS, VOCABULARY, WINDOW, Hybrid, model
from .oracle import check_greedy

INTERVAL = 16
"""Tokens between saved states."""
STEP, LONGEST, SEQUENCES = 48, 96, 4


@dataclass(frozen=True)
class Compiled:
    """The model, compiled for one page size. Engines over it are made test by test: each starts with nobody's memory."""

    module: Hybrid
    built: Built

    @property
    def page_size(self) -> int:
        return self.built.model.limits.page_size

    def engine(self, *, pages: Sequence[int] | None = None, slots: int | None = None, chunk: int = STEP, prefix: bool = True) -> Engine:
        """An engine with some of the memory. `chunk` is the token budget of its steps."""
        own = self.built.model
        sizes = own.sizes
        given_pages = sizes.num_pages if pages is None else [min(both) for both in zip(pages, sizes.num_pages, strict=True)]
        engine = Engine(own, given_pages, min(slots or sizes.num_slots, sizes.num_slots), prefix_cache=prefix, checkpoint_interval=INTERVAL)
        engine.scheduler.limits = replace(own.limits, max_tokens=chunk)
        self.poison(engine)
        return engine

    def step(self, engine: Engine) -> list[RequestOutput]:
        """One step; afterwards every unit is accounted for, and what nobody holds or can find is poison."""
        outputs = engine.step()
        engine.cache.audit()
        self.poison(engine)
        return outputs

    def drain(self, engine: Engine) -> dict[str, RequestOutput]:
        """Steps until nothing is left; the finished outputs by request."""
        finished: dict[str, RequestOutput] = {}
        while engine.has_work:
            finished |= {output.request_id: output for output in self.step(engine) if output.finished}
        return finished

    def answer(self, engine: Engine, prompt: Sequence[int], length: int = 4) -> RequestOutput:
        """The answer to one prompt, held against the oracle."""
        name = engine.submit(prompt, greedy(length))
        output = self.drain(engine)[name]
        self.check(output, length)
        return output

    def check(self, output: RequestOutput, length: int) -> None:
        if length:
            check_greedy(self.module, self, [output], length)  # type: ignore[arg-type]

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[RequestOutput]:
        """What the oracle asks where two tokens are as good: each prompt alone, in an engine that knows no other."""
        outputs = []
        for prompt in prompts:
            engine = self.engine()
            name = engine.submit(prompt, params)
            outputs.append(self.drain(engine)[name])
        return outputs

    def poison(self, engine: Engine) -> None:
        own = self.built.model
        for pool in own._layout.pools:
            units = engine.cache.slots.units if pool.group < 0 else engine.cache.groups[pool.group]
            own.pools.tensors[pool.name][units.free_units()] = float("nan")


def greedy(length: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)


def text(length: int, seed: int) -> list[int]:
    """Tokens of one of a few texts; the shorter ones are beginnings of the longer."""
    return torch.randint(VOCABULARY, (LONGEST,), generator=torch.Generator().manual_seed(seed))[:length].tolist()


@pytest.fixture(scope="module")
def by_page_size() -> dict[int, Compiled]:
    module, made = model(), {}
    for page_size in (4, 16):
        options: dict[str, Any] = {"page_size": page_size, "checkpoint_interval": INTERVAL, "memory": "1MiB"}
        config = make_config({**options, "max_batch_tokens": STEP, "max_model_len": LONGEST, "max_requests": SEQUENCES})
        made[page_size] = Compiled(module, build(module, config))
    return made


@pytest.fixture
def small(by_page_size: dict[int, Compiled]) -> Compiled:
    """With pages of 4."""
    return by_page_size[4]


# -- it is captured -------------------------------------------------------------------------------------------------------


def test_every_mixer_is_found_where_it_is_and_numbers_are_compared(small):
    found: dict[str, list[str]] = {}
    for claim in small.built.plan.claims:
        found.setdefault(".".join(claim.module.split(".")[:2]), []).append(claim.op)
    assert found == OPS
    assert small.built.plan.attempts[-1].reason.startswith("structure and numbers verified")
    spec = small.built.model.spec
    assert [group.window for group in spec.groups] == [None, WINDOW]
    assert spec.slot_bytes > 0
    assert spec.checkpoints


# -- reuse ----------------------------------------------------------------------------------------------------------------


def test_a_prompt_goes_on_from_the_last_saved_state_that_it_shares(small):
    engine = small.engine()
    assert small.answer(engine, text(40, 1)).reused.length == 0
    again = small.answer(engine, text(40, 1))
    assert (again.reused.length, again.reused.reason) == (32, "no state was saved further on")
    longer = small.answer(engine, text(70, 1))
    assert longer.reused.length == 32
    other = small.answer(engine, [*text(20, 1), *text(30, 2)])
    assert other.reused.length == 16
    assert engine.stats.reused_tokens == 80


def test_what_an_answer_left_is_reused_by_what_follows_it(small):
    engine = small.engine(chunk=7)
    first = small.answer(engine, text(30, 1), 25)
    conversation = [*text(30, 1), *first.outputs[0].token_ids, *text(5, 2)]
    assert small.answer(engine, conversation).reused.length == 48


@pytest.mark.parametrize(
    ("length", "reason"), [(1, "not longer than one checkpoint interval of 16 tokens"), (17, "no prompt that begins so was cached")]
)
def test_nothing_reused_has_its_reason(small, length, reason):
    reused = small.answer(small.engine(), text(length, 3)).reused
    assert reused.length == 0
    assert reason in reused.reason


def test_without_a_prefix_cache_the_reason_says_so(small):
    engine = small.engine(prefix=False)
    small.answer(engine, text(40, 1))
    assert small.answer(engine, text(40, 1)).reused.reason == "prefix reuse is off"


def test_the_reusable_prefix_is_the_least_that_every_mixer_has(small):
    # 23 pages of attention that sees all, enough of the rest: a second prompt takes pages of the first, not its states.
    engine = small.engine(pages=[24, 10**6])
    small.answer(engine, text(60, 1))
    small.answer(engine, text(60, 2))
    reused = small.answer(engine, text(60, 1)).reused
    assert reused.length < 48
    assert "pages of attention were evicted" in reused.reason
    # The window's pages: 7 are just enough for one sequence, so those behind the first prompt's states are gone.
    engine = small.engine(pages=[10**6, 8], chunk=4)
    small.answer(engine, text(60, 1))
    small.answer(engine, text(60, 2))
    reused = small.answer(engine, text(60, 1)).reused
    assert reused.length < 48
    assert f"pages of window-{WINDOW} attention were evicted" in reused.reason
    # One slot for the sequence that runs and one for a state.
    engine = small.engine(slots=3)
    small.answer(engine, text(60, 1))
    small.answer(engine, text(60, 2))
    reused = small.answer(engine, text(60, 1)).reused
    assert reused.length == 0
    assert reused.reason == "no state was saved further on"


def test_saved_states_are_bounded_and_the_one_that_was_used_least_lately_goes_first(small):
    engine = small.engine(slots=5)  # the null slot, one that runs, three saved
    a, b, c, d = ([*text(17, seed)] for seed in (1, 2, 3, 4))
    for prompt in (a, b, c):
        assert small.answer(engine, prompt).reused.length == 0
    assert len(engine.cache.store.checkpoints()) == 3
    assert small.answer(engine, a).reused.length == 16
    small.answer(engine, d)
    assert len(engine.cache.store.checkpoints()) == 3
    assert [small.answer(engine, prompt).reused.length for prompt in (a, c, d)] == [16, 16, 16]
    assert small.answer(engine, b).reused.reason == "no state was saved further on"


# -- under load -----------------------------------------------------------------------------------------------------------

requests = st.fixed_dictionaries(
    {
        "seed": st.integers(1, 2),
        "shared": st.sampled_from([0, 3, 16, 17, 33, 50]),
        "tail": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        "max_tokens": st.sampled_from([0, 1, 4, 9, 14, 40]),
        "arrives": st.integers(0, 10),
        "aborted": st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)),
    }
)
loads = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([4, 16]),
        "chunk": st.sampled_from([1, 3, 7, 16, STEP]),
        "tokens": st.tuples(st.integers(64, 160), st.integers(40, 160)),
        "slots": st.integers(SEQUENCES + 1, SEQUENCES + 6),
        "prefix": st.sampled_from([True, True, True, False]),
        "requests": st.lists(requests, min_size=1, max_size=7),
    }
)
_LOAD = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


def run(compiled: Compiled, load: dict[str, Any]) -> tuple[Engine, dict[str, RequestOutput]]:
    """Runs a load and holds every answer against the oracle; the engine and the outputs by request."""
    pages = [tokens // compiled.page_size + 1 for tokens in load["tokens"]]
    engine = compiled.engine(pages=pages, slots=load["slots"], chunk=load["chunk"], prefix=load["prefix"])
    submitted: dict[str, dict[str, Any]] = {}
    finished: dict[str, RequestOutput] = {}
    step = 0
    while engine.has_work or step <= 10:
        for index, request in enumerate(load["requests"]):
            if request["arrives"] == step:
                prompt = [*text(request["shared"], request["seed"]), *request["tail"]]
                try:
                    engine.submit(prompt, greedy(request["max_tokens"]), f"r{index}")
                    submitted[f"r{index}"] = request
                except PromptTooLongError:
                    assert len(prompt) > engine.max_length
            if request["aborted"] == step:
                engine.abort(f"r{index}")
        for output in compiled.step(engine):
            if output.finished:
                assert output.request_id not in finished
                finished[output.request_id] = output
        step += 1
        assert step < 3000, "the load does not come to its end"
    assert finished.keys() == submitted.keys()
    for name, output in finished.items():
        answer = output.outputs[0]
        if answer.finish_reason == "abort":
            assert submitted[name]["aborted"] is not None
        else:
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == min(submitted[name]["max_tokens"], engine.max_length - len(output.prompt_token_ids))
        compiled.check(output, len(answer.token_ids))
        assert output.reused.reason
        assert output.reused.length % INTERVAL == 0
    assert all(allocator.num_owned == 0 for allocator in [*engine.cache.groups, engine.cache.slots.units])
    return engine, finished


def test_a_load_with_hits_preemptions_and_an_abort_answers_as_full_recompute_does(small):
    request = {"seed": 1, "shared": 33, "tail": [5, 6], "max_tokens": 40, "aborted": None}
    load = [{**request, "arrives": arrives, "tail": [arrives]} for arrives in range(5)]
    load += [{**request, "arrives": 6, "aborted": 9}, {**request, "arrives": 10, "shared": 50}]
    engine, finished = run(small, {"chunk": 16, "tokens": (112, 112), "slots": 8, "prefix": True, "requests": load})
    assert engine.stats.preemptions > 0
    assert engine.stats.reused_tokens > 0
    assert finished["r5"].outputs[0].finish_reason == "abort"


@settings(max_examples=20, **_LOAD)
@given(load=loads)
def test_every_answer_equals_full_recompute_under_any_load(by_page_size, load):
    run(by_page_size[load["page_size"]], load)


@pytest.mark.slow
@settings(max_examples=200, **_LOAD)
@given(load=loads)
def test_every_answer_equals_full_recompute_under_many_loads(by_page_size, load):
    run(by_page_size[load["page_size"]], load)
