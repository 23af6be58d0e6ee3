"""What goes into a step, in which order, and who has to leave."""

from __future__ import annotations

import pytest

from ad_core.api.types import Limits
from ad_core.cache.batch import SAMPLED
from ad_core.cache.manager import CacheManager
from ad_core.cache.spec import CacheSpec, PageGroupSpec
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.request import Request
from ad_core.runtime.scheduler import Scheduler, StepPlan


class Harness:
    """A scheduler, and a step that samples token 1 for everybody."""

    def __init__(self, *, pages: int = 100, size: int = 4, budget: int = 8, lanes: int = 4, slots: int = 0, **options):
        spec = CacheSpec(size, (PageGroupSpec(None, 64),), 8 if slots else 0)
        cache = CacheManager(spec, [pages], slots, copy_slot=lambda source, target: None, **options)
        self.cache, self.scheduler, self.count = cache, Scheduler(cache, Limits(budget, lanes, 400, size)), 0

    def add(self, prompt: list[int], **params) -> Request:
        self.count += 1
        request = Request(str(self.count), self.count, prompt, SamplingParams(**params), seed=0, stop_ids=frozenset())
        self.scheduler.add(request)
        return request

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for work in plan.work:
            work.row()
        for work in plan.work:
            self.scheduler.advance(work)
            if work.samples:
                work.sequence.tokens.append(1)
        self.cache.audit()
        return plan

    def lengths(self, plan: StepPlan) -> list[tuple[str, int]]:
        return [(work.sequence.request.request_id, work.num_tokens) for work in plan.work]


def test_a_long_prompt_goes_in_chunks_and_only_its_last_token_is_sampled():
    harness = Harness(budget=8)
    harness.add([5] * 19)
    plans = [harness.step() for _ in range(4)]
    assert [harness.lengths(plan) for plan in plans] == [[("1", 8)], [("1", 8)], [("1", 3)], [("1", 1)]]
    assert [plan.work[0].samples for plan in plans] == [False, False, True, True]
    assert [plan.work[0].num_tokens for plan in plans] == [8, 8, 3, 1]


def test_decodes_come_first_and_prompts_share_what_is_left():
    harness = Harness(budget=8)
    harness.add([5] * 3)
    harness.step()
    harness.add([6] * 9)
    harness.add([7] * 9)
    assert harness.lengths(harness.step()) == [("1", 1), ("2", 7)]
    assert harness.lengths(harness.step()) == [("1", 1), ("2", 2), ("3", 5)]
    assert harness.lengths(harness.step()) == [("1", 1), ("2", 1), ("3", 4)]


def test_rows_of_one_token_come_first_whatever_they_are():
    harness = Harness(budget=8)
    harness.add([5] * 10)
    harness.add([6] * 7)
    harness.step()
    plan = harness.scheduler.schedule()
    assert [work.num_tokens for work in plan.work] == sorted((work.num_tokens for work in plan.work), key=lambda count: count > 1)


def test_a_decode_feeds_the_id_on_the_device_and_a_chunk_its_own_ids():
    harness = Harness(budget=8)
    harness.add([5, 6, 7])
    harness.step()
    harness.add([8, 9])
    first, second = [work.row() for work in harness.scheduler.schedule().work]
    assert (list(first.token_ids), first.context_len, first.num_outputs) == ([SAMPLED], 3, 1)
    assert (list(second.token_ids), second.context_len, second.num_outputs) == ([8, 9], 0, 1)
    assert (first.lane, second.lane) == (1, 2)


def test_a_single_token_left_of_a_prompt_is_not_taken_for_a_sampled_one():
    harness = Harness(budget=2)
    harness.add([5, 6, 7])
    harness.step()
    assert list(harness.scheduler.schedule().work[0].row().token_ids) == [7]


def test_chunks_end_where_states_are_saved():
    harness = Harness(budget=16, slots=8, checkpoint_interval=8)
    harness.add([5] * 19)
    assert [harness.lengths(harness.step()) for _ in range(3)] == [[("1", 8)], [("1", 8)], [("1", 3)]]


def test_no_more_run_than_there_are_lanes_and_lanes_come_back():
    harness = Harness(budget=64, lanes=2)
    requests = [harness.add([index] * 3) for index in range(3)]
    harness.step()
    assert [sequence.lane for request in requests for sequence in request.sequences] == [1, 2, 0]
    harness.scheduler.finish(requests[0].sequences[0])
    harness.step()
    assert [sequence.lane for request in requests for sequence in request.sequences] == [0, 2, 1]


def test_the_newest_is_preempted_first_and_comes_back_before_those_that_wait():
    harness = Harness(pages=1 + 6, size=2, budget=16, lanes=3)
    old, new = harness.add([5] * 3), harness.add([6] * 3)
    harness.step()
    waiting = harness.add([7] * 2)
    while not harness.scheduler.preemptions:
        harness.step()
    assert harness.scheduler.running == [old.sequences[0]]
    assert harness.scheduler.returning == [new.sequences[0]]
    assert list(harness.scheduler.waiting) == [waiting.sequences[0]]
    assert new.preemptions == 1
    harness.scheduler.finish(old.sequences[0])
    plan = harness.step()
    assert plan.admitted[0].request is new
    assert new.sequences[0].tokens[:3] == [6, 6, 6]


def test_a_victim_that_was_planned_already_leaves_the_plan_and_gives_its_budget_back():
    harness = Harness(pages=1 + 6, size=4, budget=6, lanes=2, slots=8, checkpoint_interval=4)
    old, new = harness.add([5] * 16), harness.add([6])
    assert harness.lengths(harness.step()) == [("2", 1), ("1", 4)]  # the chunk of "1" ends at a boundary, so "2" fits in
    for _ in range(harness.cache.groups[0].available):
        harness.cache.groups[0].take()  # as if others had grown
    plan = harness.scheduler.schedule()  # "2" decodes first, then "1" needs a page
    assert harness.lengths(plan) == [("1", 4)]
    assert harness.scheduler.returning == [new.sequences[0]]
    assert harness.scheduler.running == [old.sequences[0]]
    assert harness.scheduler._budget == 2


def test_a_full_cache_delays_admission_instead_of_thrashing():
    harness = Harness(pages=1 + 5, size=4, budget=64, lanes=4)
    first, second = harness.add([5] * 12), harness.add([6] * 12)
    assert harness.step().admitted == [first.sequences[0]]
    for _ in range(3):
        assert harness.step().admitted == []
    assert harness.scheduler.preemptions == 0
    harness.scheduler.finish(first.sequences[0])
    assert harness.step().admitted == [second.sequences[0]]


def test_who_cannot_be_admitted_is_not_matched_again_until_memory_came_back(monkeypatch):
    harness = Harness(pages=1 + 5, size=4, budget=64)
    first = harness.add([5] * 12)
    harness.add([6] * 12)
    harness.step()
    calls = []
    original = harness.cache.admit
    monkeypatch.setattr(harness.cache, "admit", lambda *args, **options: calls.append(1) or original(*args, **options))
    for _ in range(4):
        harness.step()
    assert calls == []
    harness.scheduler.finish(first.sequences[0])
    harness.step()
    assert calls


def test_further_samples_start_when_the_prompt_is_computed_and_share_its_pages():
    harness = Harness(budget=16)
    request = harness.add([5] * 21, n=3)
    assert [len(harness.step().work) for _ in range(2)] == [1, 1]
    plan = harness.step()
    assert len(plan.work) == 3
    pages = [sequence.cache.pages[0][:5] for sequence in request.sequences]
    assert pages[0] == pages[1] == pages[2]
    assert len({sequence.cache.pages[0][5] for sequence in request.sequences}) == 3


def test_a_sample_that_comes_back_with_tokens_of_its_own_is_not_lent_those_of_another():
    harness = Harness(budget=64, size=4, prefix_reuse=False)
    first, second = (request := harness.add([5] * 5, n=2)).sequences
    while len(second.tokens) < 14:
        harness.step()
    assert second.cache.reuse.length == 4
    harness.scheduler._preempt(second)
    harness.step()
    assert second.cache.reuse.length == 0
    assert set(first.cache.pages[0]).isdisjoint(second.cache.pages[0])
    assert request.preemptions == 1


def test_who_decodes_is_not_held_up_by_an_older_sequence_that_computes_its_prompt():
    harness = Harness(budget=8, size=16)
    harness.add([5] * 14, n=2)  # less than a page: the second sample computes the prompt anew, and is older than "2"
    harness.add([6] * 2)
    assert [harness.lengths(harness.step()) for _ in range(2)] == [[("1", 8)], [("1", 6), ("2", 2)]]
    for _ in range(2):
        assert harness.lengths(harness.step()) == [("1", 1), ("2", 1), ("1", 6)]


@pytest.mark.parametrize("where", ["running", "returning", "waiting"])
def test_a_sequence_can_be_taken_out_wherever_it_is(where):
    harness = Harness(budget=4, lanes=1)
    first, second = harness.add([5] * 3, n=2), harness.add([6] * 3)
    harness.step()
    sequence = {"running": first.sequences[0], "returning": first.sequences[1], "waiting": second.sequences[0]}[where]
    assert sequence in getattr(harness.scheduler, where)
    harness.scheduler.finish(sequence)
    assert sequence not in getattr(harness.scheduler, where)
    harness.cache.audit()
    harness.scheduler.finish(sequence)  # once more changes nothing
    harness.cache.audit()
