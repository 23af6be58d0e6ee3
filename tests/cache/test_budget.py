"""Numbers of pages from bytes: against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ad_core.api.errors import OutOfMemoryBudgetError
from ad_core.api.types import Limits
from ad_core.cache.budget import sizes_for
from ad_core.cache.spec import CacheSpec, PageGroupSpec


def limits(max_sequences: int = 4, max_model_len: int = 64, page_size: int = 4) -> Limits:
    return Limits(max_tokens=8, max_sequences=max_sequences, max_model_len=max_model_len, page_size=page_size)


def test_all_of_a_large_budget_is_never_more_than_the_limits_can_use():
    spec = CacheSpec(4, (PageGroupSpec(None, 100),))
    sizes = sizes_for(spec, limits(), 1 << 30)
    assert sizes.num_pages == (4 * 16 + 1,)
    assert sizes.num_bytes == 65 * 100


def test_a_windowed_group_needs_its_window_and_one_step_a_sequence():
    spec = CacheSpec(4, (PageGroupSpec(None, 100), PageGroupSpec(8, 100)))
    sizes = sizes_for(spec, limits(), 1 << 30)
    assert sizes.num_pages[1] == 4 * (4 + 1) + 1


def test_a_budget_below_one_page_of_each_pool_is_refused_with_both_numbers():
    spec = CacheSpec(4, (PageGroupSpec(None, 1 << 20),), slot_bytes=1 << 20)
    with pytest.raises(OutOfMemoryBudgetError, match=r"3\.0 MiB.*\n.*7\.0 MiB"):
        sizes_for(spec, limits(), 3 << 20)


@given(memory=st.integers(700, 40_000), windowed=st.booleans(), slot_bytes=st.sampled_from([0, 50]))
def test_the_sizes_fit_and_one_more_block_would_not(memory: int, windowed: bool, slot_bytes: int):
    groups = (PageGroupSpec(None, 100), PageGroupSpec(8, 60)) if windowed else (PageGroupSpec(None, 100),)
    spec = CacheSpec(4, groups, slot_bytes=slot_bytes)
    sizes = sizes_for(spec, limits(), memory)
    used = sum(n * g.page_bytes for n, g in zip(sizes.num_pages, groups, strict=True)) + sizes.num_slots * slot_bytes
    assert used == sizes.num_bytes <= memory
    if sizes.num_pages[0] - 1 < 4 * 16:
        assert used + sum(group.page_bytes for group in groups) > memory or windowed


def test_saved_states_get_a_slot_every_interval_but_no_more_bytes_than_pages():
    spec = CacheSpec(4, (PageGroupSpec(None, 100),), slot_bytes=50)
    most = 4 * 16 * 4  # tokens of all sequences
    assert sizes_for(spec, limits(), 1 << 30, 8).num_slots == 5 + most // 8
    large = CacheSpec(4, (PageGroupSpec(None, 100),), slot_bytes=1000)
    sizes = sizes_for(large, limits(), 20_000, 8)
    assert 0 < (sizes.num_slots - 5) * 1000 <= sizes.num_pages[0] * 100
    assert sizes.num_bytes <= 20_000
    assert sizes_for(CacheSpec(4, (), slot_bytes=50), limits(), 1 << 30, 8).num_slots == 5 + most // 8


@pytest.mark.parametrize("interval", [None, 8])
def test_no_slot_is_left_for_states_that_are_not_saved(interval: int | None):
    spec = CacheSpec(4, (PageGroupSpec(None, 100),), slot_bytes=50, checkpoints=interval is None)
    assert sizes_for(spec, limits(), 1 << 30, interval).num_slots == 5
    assert sizes_for(CacheSpec(4, (PageGroupSpec(None, 100),)), limits(), 1 << 30, interval).num_slots == 0
