"""Sequences in the cache: admission, growth, publication, windows, states, release."""

from __future__ import annotations

import sys

import pytest

from ad_core.api.errors import CacheAuditError, ConfigError, OutOfMemoryBudgetError
from ad_core.cache.manager import CacheManager, SequenceCache
from ad_core.cache.spec import CacheSpec, PageGroupSpec


def make(*windows: int | None, pages: int | list[int] = 20, size: int = 4, slots: int = 0, **options) -> CacheManager:
    spec = CacheSpec(size, tuple(PageGroupSpec(window, 64) for window in windows), 8 if slots else 0, options.pop("checkpoints", True))
    counts = pages if isinstance(pages, list) else [pages] * len(windows)
    if slots:
        options.setdefault("copy_slot", lambda source, target: None)
    return CacheManager(spec, counts, slots, **options)


def compute(cache: CacheManager, tokens: list[int], chunk: int = 1000, **options) -> SequenceCache:
    """Admits a sequence and computes all of its tokens."""
    own = cache.admit(tokens, **options)
    assert own is not None
    while own.computed < len(tokens):
        end = min(own.computed + chunk, len(tokens), cache.next_boundary(own.computed))
        assert cache.extend(own, end)
        cache.commit(own, tokens, end)
        cache.audit()
    return own


def test_a_prompt_that_was_seen_is_reused_up_to_its_last_full_page_and_one_token_is_left():
    cache = make(None)
    prompt = list(range(8))
    first = compute(cache, prompt)
    cache.release(first)
    again = cache.admit(prompt)
    assert again.reuse.length == 4  # page 2 holds the last token, which is computed again
    assert again.reuse.reason == "one token at least is computed"
    assert again.pages[0] == first.pages[0][:1]
    longer = cache.admit([*prompt, 8])
    assert longer.reuse.length == 8
    other = cache.admit([*prompt[:4], 99, 98, 97, 96, 95])
    assert other.reuse.length == 4
    assert "behind its first 4 tokens" in other.reuse.reason
    assert cache.admit([50] * 9).reuse.reason == "no prompt that begins so was cached"
    assert "not longer than one page" in cache.admit([1, 2]).reuse.reason
    cache.audit()


def test_live_sequences_share_pages_and_each_page_is_released_once():
    cache = make(None)
    first = compute(cache, list(range(9)))
    second = compute(cache, list(range(9)))
    assert first.pages[0][:2] == second.pages[0][:2]
    assert first.pages[0][2] != second.pages[0][2]
    assert cache.groups[0].num_owned == 4
    cache.release(first)
    cache.audit()
    assert cache.groups[0].num_owned == 3
    cache.release(second)
    cache.audit()
    assert cache.groups[0].num_owned == 0


def test_only_full_pages_of_computed_tokens_are_published():
    cache = make(None)
    tokens = list(range(20))
    own = cache.admit(tokens)
    cache.extend(own, 20)
    cache.commit(own, tokens, 7)
    assert cache.admit(tokens).reuse.length == 4


def test_two_that_compute_the_same_at_once_keep_pages_of_their_own():
    cache = make(None)
    tokens = list(range(9))
    first, second = cache.admit(tokens), cache.admit(tokens)
    for own in (first, second):
        assert cache.extend(own, 9)
    for own in (first, second):
        cache.commit(own, tokens, 9)
        cache.audit()
    cache.release(first)
    cache.release(second)
    cache.audit()
    assert cache.groups[0].num_cached == 2


def test_with_reuse_off_nothing_outlives_its_sequence():
    cache = make(None, prefix_reuse=False)
    cache.release(compute(cache, list(range(9))))
    assert cache.groups[0].num_cached == 0
    assert cache.admit(list(range(9))).reuse.reason == "prefix reuse is off"


def test_extend_takes_all_or_nothing_and_room_says_how_much():
    cache = make(None, pages=5)
    own = cache.admit([0] * 8)
    assert cache.extend(own, 8)
    assert cache.room(own) == 16
    assert not cache.extend(own, 17)
    assert own.num_blocks == 2
    assert cache.extend(own, 16)
    cache.audit()


def test_nobody_is_admitted_on_pages_that_others_were_promised():
    cache = make(None, pages=11)
    first = cache.admit([0] * 24)
    cache.extend(first, 4)  # one page of the six that it will need
    assert cache.admit([1] * 20) is None  # 9 are left, 5 and one more are promised
    assert cache.admit([1] * 12) is not None
    cache.audit()


def test_cached_pages_make_room_for_new_ones_from_the_end_of_the_oldest_chain():
    cache = make(None, pages=1 + 8)
    old, new = list(range(13)), list(range(100, 113))
    cache.release(compute(cache, old))
    cache.release(compute(cache, new))  # 3 + 3 pages are cached now and 2 are free
    cache.release(compute(cache, [50] * 12))
    cache.audit()
    assert len(cache.store.walk(old, 3)) == 2
    assert len(cache.store.walk(new, 3)) == 3


def test_pages_behind_the_window_come_back_and_their_entries_become_null():
    cache = make(None, 6)
    tokens = list(range(30))
    own = compute(cache, tokens, chunk=3)
    assert own.pages[0].count(0) == 0
    # Position 30 sees keys 25 to 30: blocks 6 and 7.
    assert own.pages[1][:6] == [0] * 6
    assert all(own.pages[1][6:])
    assert cache.groups[1].num_owned == 2


def test_a_windowed_sequence_goes_on_for_ever_in_the_pages_of_its_window():
    cache = make(6, pages=1 + 3)
    assert cache.capacity() == sys.maxsize
    own = cache.admit([0] * 200)
    assert own is not None
    for length in range(1, 201):
        assert cache.extend(own, length)
        cache.commit(own, [0] * 200, length)
        cache.audit()


def test_a_hit_in_a_windowed_group_needs_only_the_pages_inside_the_window():
    cache = make(6, pages=30)
    tokens = list(range(33))
    cache.release(compute(cache, tokens))
    for page in [block.pages[0] for block in cache.store.walk(tokens, 6)]:  # all that position 32 does not see
        cache.store.forget_page(0, page)
        cache.groups[0].drop(page)
    cache.audit()
    own = cache.admit(tokens)
    assert own.reuse.length == 32
    assert own.pages[0][:6] == [0] * 6
    assert all(own.pages[0][6:])
    cache.audit()
    cache.release(own)
    shorter = cache.admit(tokens[:20])
    assert shorter.reuse.length == 0
    assert shorter.reuse.reason == "pages of window-6 attention were evicted"


def test_the_reusable_length_is_the_least_of_all_groups():
    cache = make(None, 6, pages=[30, 30])
    tokens = list(range(33))
    cache.release(compute(cache, tokens))
    page = cache.store.walk(tokens, 8)[6].pages[1]
    cache.store.forget_page(1, page)
    cache.groups[1].drop(page)
    assert cache.admit(tokens).reuse.length == 24
    cache.audit()


def test_states_are_saved_at_boundaries_and_restored_from_the_last_one():
    copies: list[tuple[int, int]] = []
    cache = make(None, slots=6, checkpoint_interval=8, copy_slot=lambda source, target: copies.append((source, target)))
    tokens = list(range(27))
    first = compute(cache, tokens, chunk=4)  # 4 and 12 are page boundaries, and no more than that
    saved = [target for _, target in copies]
    assert [source for source, _ in copies] == [first.slot] * 3  # after 8, 16 and 24 tokens
    copies.clear()
    cache.release(first)
    again = cache.admit(tokens[:23])
    assert again.reuse.length == 16
    assert again.reuse.reason == "no state was saved further on"
    assert copies == [(saved[1], again.slot)]
    cache.audit()
    assert "checkpoint interval of 8" in cache.admit(tokens[:7]).reuse.reason


def test_a_model_of_states_alone_reuses_checkpoints():
    cache = make(slots=6, checkpoint_interval=8)
    assert cache.capacity() == sys.maxsize
    tokens = list(range(20))
    cache.release(compute(cache, tokens, chunk=7))
    assert cache.admit(tokens).reuse.length == 16
    cache.audit()


def test_checkpoints_are_bounded_and_yield_to_live_sequences():
    cache = make(slots=4, checkpoint_interval=4)
    first = compute(cache, list(range(30)))
    assert cache.slots.units.num_cached == 2
    second, third = cache.admit([50] * 5), cache.admit([60] * 5)
    assert cache.slots.units.num_cached == 0
    assert cache.admit([70] * 5) is None
    cache.commit(first, list(range(32)), 32)  # a boundary, and nowhere to save
    cache.audit()
    for own in (first, second, third):
        cache.release(own)
    cache.audit()


def test_a_lone_sequence_gets_the_last_slot_even_if_a_state_was_saved_there():
    cache = make(slots=2, checkpoint_interval=4)
    tokens = list(range(9))
    own = cache.admit(tokens)
    cache.extend(own, 4)
    cache.release(own)
    slot = cache.slots.units.take()  # a state saved in the only slot there is
    cache.slots.units.keep(slot)
    cache.slots.units.release(slot)
    cache.store.put_checkpoint(cache.store.descend(cache.store.root, tokens[:4]), slot)
    again = cache.admit(tokens)
    assert again is not None
    assert again.reuse.reason == "no slot is left beside the saved state"
    cache.audit()


def test_states_that_cannot_be_copied_are_said_to_prevent_reuse():
    cache = make(None, slots=4, checkpoints=False)
    cache.release(compute(cache, list(range(20))))
    assert cache.admit(list(range(20))).reuse.reason == "states of this model cannot be restored from a copy"


def test_a_donor_lends_its_full_pages_without_a_prefix_store():
    cache = make(None, prefix_reuse=False)
    prompt = list(range(10))
    donor = compute(cache, prompt)
    sharer = cache.admit(prompt, donor=donor)
    assert sharer.reuse.length == 8
    assert sharer.pages[0] == donor.pages[0][:2]
    cache.release(donor)
    cache.audit()
    cache.release(sharer)
    cache.audit()
    assert cache.groups[0].num_free == 19


def test_a_donor_lends_only_what_it_has_computed():
    cache = make(None, prefix_reuse=False)
    prompt = list(range(18))
    donor = cache.admit(prompt)
    cache.extend(donor, 18)
    cache.commit(donor, prompt, 9)
    assert cache.admit(prompt, donor=donor).reuse.length == 8


def test_a_donor_whose_window_has_moved_on_lends_nothing():
    cache = make(4, prefix_reuse=False)
    tokens = list(range(30))
    donor = compute(cache, tokens, chunk=5)
    assert cache.admit(tokens[:10], donor=donor).reuse.length == 0


def test_what_a_poisoned_sequence_computed_cannot_be_found_and_nor_can_what_it_built_on():
    cache = make(None, slots=6, checkpoint_interval=4)
    cache.release(compute(cache, list(range(9))))
    poisoned = compute(cache, list(range(20)))
    assert poisoned.reuse.length == 8
    cache.release(poisoned, discard=True)
    cache.audit()
    assert len(cache.store) == 0
    assert cache.groups[0].num_cached == cache.slots.units.num_cached == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"checkpoint_interval": 6}, ConfigError, "not a multiple of page_size 4"),
        ({"pages": [20, 20]}, ConfigError, "2 page counts are given for 1"),
        ({"pages": 1}, OutOfMemoryBudgetError, "cannot hold one sequence"),
        ({"slots": 1}, OutOfMemoryBudgetError, "cannot hold one sequence"),
    ],
)
def test_sizes_that_cannot_work_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        make(None, **arguments)


def test_the_audit_sees_a_page_that_two_sequences_hold_and_one_counts():
    cache = make(None)
    own, other = cache.admit([0] * 5), cache.admit([1] * 5)
    cache.extend(own, 5)
    cache.extend(other, 5)
    other.pages[0][1] = own.pages[0][1]
    with pytest.raises(CacheAuditError):
        cache.audit()
