"""How much of a cached chain can be taken over, against the definition of a window."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from ad_core.cache.reuse import first_live_block, reusable_blocks


def is_usable(chain: list[SimpleNamespace], blocks: int, windows: list[int | None], page_size: int, states: bool) -> bool:
    """By the letter: every key that a query at the first position behind, or later, may see lies on a page that is there."""
    position = blocks * page_size
    for group, window in enumerate(windows):
        for j in range(position):
            if (window is None or j > position - window) and not chain[j // page_size].pages[group]:
                return False
    return not (states and blocks and not chain[blocks - 1].checkpoint)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=3, max_size=3), st.integers(0, 1)), max_size=8),
    st.lists(st.one_of(st.none(), st.integers(1, 12)), max_size=3),
    st.integers(1, 4),
    st.booleans(),
)
def test_the_reusable_length_is_the_longest_that_every_group_and_state_allows(contents, windows, page_size, states):
    chain = [SimpleNamespace(pages=pages[: len(windows)], checkpoint=checkpoint) for pages, checkpoint in contents]
    blocks, obstacle = reusable_blocks(chain, windows, page_size, states=states)
    usable = [count for count in range(len(chain) + 1) if is_usable(chain, count, windows, page_size, states)]
    assert blocks == max(usable)
    assert bool(obstacle) == (blocks < len(chain))


@given(st.integers(0, 100), st.integers(1, 40), st.integers(1, 8))
def test_no_query_from_a_position_on_sees_a_block_before_the_first_live_one(length, window, page_size):
    first = first_live_block(length, window, page_size)
    seen = [j // page_size for i in range(length, length + 3) for j in range(i + 1) if j > i - window]
    assert first <= min(seen)
    assert first == min(j // page_size for j in range(length + 1) if j > length - window)


def test_the_reason_names_what_is_missing():
    whole, gone = SimpleNamespace(pages=[1, 1], checkpoint=0), SimpleNamespace(pages=[1, 0], checkpoint=0)
    assert reusable_blocks([whole, gone], [None, 8], 4, states=False) == (1, "pages of window-8 attention were evicted")
    assert reusable_blocks([whole], [None, None], 4, states=True) == (0, "no state was saved further on")


def test_with_states_the_reason_is_what_the_next_saved_state_lacks():
    whole, gone = SimpleNamespace(pages=[1], checkpoint=0), SimpleNamespace(pages=[0], checkpoint=0)
    saved, lost = SimpleNamespace(pages=[1], checkpoint=7), SimpleNamespace(pages=[0], checkpoint=8)
    evicted = "pages of attention were evicted"
    assert reusable_blocks([whole, saved, whole, lost], [None], 4, states=True) == (2, evicted)
    assert reusable_blocks([gone, saved], [None], 4, states=True) == (0, evicted)
    assert reusable_blocks([saved, gone], [None], 4, states=True) == (1, "no state was saved further on")
