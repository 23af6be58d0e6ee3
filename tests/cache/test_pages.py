"""The allocator of units and its preference for neighbours."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_core.api.errors import CacheAuditError
from ad_core.cache.pages import PageAllocator
from ad_core.cache.units import UnitAllocator


def make(size: int) -> tuple[PageAllocator, list[int]]:
    evicted: list[int] = []
    return PageAllocator(size, evicted.append), evicted


def test_the_null_page_is_never_handed_out_and_the_others_come_in_order():
    pages, _ = make(6)
    assert [pages.take() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert pages.available == 0
    with pytest.raises(CacheAuditError, match="every unit is owned"):
        pages.take()


def test_a_shared_page_is_free_only_when_its_last_holder_lets_go():
    pages, _ = make(3)
    page = pages.take()
    pages.retain(page)
    pages.release(page)
    assert pages.num_owned == 1
    pages.release(page)
    assert pages.num_owned == 0
    with pytest.raises(CacheAuditError, match="nobody holds it"):
        pages.release(page)
    with pytest.raises(CacheAuditError, match="not cached"):
        pages.retain(page)


def test_kept_pages_outlive_their_holders_and_the_least_recently_used_is_evicted_first():
    pages, evicted = make(4)
    a, b, c = (pages.take() for _ in range(3))
    for page in (a, b, c):
        pages.keep(page)
    for page in (b, a, c):
        pages.release(page)
    assert (pages.num_free, pages.num_cached) == (0, 3)
    pages.retain(b)  # used again
    pages.release(b)
    assert [pages.take(), pages.take(), pages.take()] == [a, c, b] == evicted


def test_a_dropped_page_is_free_without_being_evicted():
    pages, evicted = make(3)
    page = pages.take()
    pages.keep(page)
    pages.release(page)
    pages.drop(page)
    assert (pages.num_free, pages.num_cached, evicted) == (2, 0, [])


def test_two_sequences_that_grow_in_turn_keep_consecutive_pages():
    pages, _ = make(41)
    runs = [pages.claim(2, 10) for _ in range(3)]
    owned: list[list[int]] = [[], [], []]
    for _ in range(10):
        for run, own in zip(runs, owned, strict=True):
            own.append(pages.take_near(own[-1] + 1 if own else 0, run.start))
    for run, own in zip(runs, owned, strict=True):
        assert own == list(run)


def test_a_claim_is_a_wish_that_yields_when_nothing_else_is_left():
    pages, _ = make(6)
    run = pages.claim(1, 5)
    assert len(run) == 5
    assert pages.available == pages.num_free == 5
    assert sorted(pages.take() for _ in range(5)) == [1, 2, 3, 4, 5]
    pages.unclaim(run)
    assert pages.num_free == 0


def test_a_claim_behind_a_shared_page_continues_it_and_what_is_left_of_it_comes_back():
    pages, _ = make(20)
    first = [pages.take() for _ in range(3)]
    run = pages.claim(2, 4, after=first[-1])
    assert run == range(4, 8)
    assert pages.take_near(4) == 4
    pages.unclaim(run)
    assert pages.claim(15, 15) == range(5, 20)


def test_a_claim_evicts_for_what_is_needed_and_not_for_what_is_hoped_for():
    pages, evicted = make(11)
    held = [pages.take() for _ in range(10)]
    for page in held:
        pages.keep(page)
    for page in reversed(held):  # as a sequence releases: its last page first
        pages.release(page)
    run = pages.claim(3, 8)
    assert run == range(8, 11)
    assert evicted == [10, 9, 8]


def test_scattered_pages_give_no_run_and_are_handed_out_all_the_same():
    pages, _ = make(8)
    held = [pages.take() for _ in range(7)]
    for page in held[::2]:
        pages.release(page)
    assert pages.claim(2, 3) == range(0)
    assert sorted(pages.take_near(0, 0) for _ in range(4)) == held[::2]


@pytest.mark.parametrize("corrupt", ["leak", "double", "count", "kept", "hidden"])
def test_the_audit_sees_each_kind_of_disorder(corrupt):
    pages, _ = make(6)
    held = Counter({pages.take(): 1, pages.take(): 1})
    cached = pages.take()
    pages.keep(cached)
    pages.release(cached)
    pages.audit(held, {cached})
    findable = {cached}
    if corrupt == "leak":
        pages._free.popitem()
    elif corrupt == "double":
        pages._free[1] = None
    elif corrupt == "count":
        pages._holders[1] += 1
    elif corrupt == "kept":
        findable.add(1)
    elif corrupt == "hidden":
        findable.clear()
    with pytest.raises(CacheAuditError):
        pages.audit(held, findable)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "near", "retain", "release", "keep", "drop", "claim", "unclaim"]), st.integers(0, 30)),
        max_size=80,
    )
)
def test_random_use_keeps_every_page_in_one_state(commands):
    findable: set[int] = set()
    pages = PageAllocator(9, findable.remove)
    held: list[int] = []
    claims: list[range] = []
    for command, number in commands:
        if command in ("take", "near") and pages.available:
            page = pages.take() if command == "take" else pages.take_near(number % 9)
            assert page not in held
            held.append(page)
        elif command == "retain" and held:
            held.append(held[number % len(held)])
            pages.retain(held[-1])
        elif command == "retain" and findable:
            held.append(sorted(findable)[number % len(findable)])
            pages.retain(held[-1])
        elif command == "release" and held:
            pages.release(held.pop(number % len(held)))
        elif command == "keep" and held:
            findable.add(held[number % len(held)])
            pages.keep(held[number % len(held)])
        elif command == "drop" and findable:
            page = sorted(findable)[number % len(findable)]
            findable.discard(page)
            pages.drop(page)
        elif command == "claim":
            claims.append(pages.claim(number % 4, number % 7, after=number % 9))
        elif command == "unclaim" and claims:
            pages.unclaim(claims.pop(number % len(claims)))
        pages.audit(Counter(held), findable)
        assert pages.num_free + pages.num_cached + pages.num_owned == 8
        assert pages._open.count(1) == len(pages._free)


def test_slots_have_the_same_bookkeeping_without_neighbours():
    units = UnitAllocator(3, lambda unit: None)
    assert [units.take(), units.take()] == [1, 2]
    units.release(1)
    units.audit({2: 1}, set())
