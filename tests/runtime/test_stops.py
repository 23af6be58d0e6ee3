"""Stop strings, wherever tokens begin and end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ad_core.runtime.stops import AnswerText


def by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the first stop string that is complete, letter by letter."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 4), min_size=30),
    st.booleans(),
)
def test_the_text_ends_at_the_first_complete_stop_string_however_it_arrives(text, stops, cuts, include):
    answer, place, shown = AnswerText(stops, include), 0, ""
    stopped = False
    for cut in cuts:
        if stopped or place >= len(text):
            break
        stopped = answer.add(text[place : place + cut])
        place += cut
        assert answer.visible.startswith(shown), "text that was shown was taken back"
        shown = answer.visible
    if not stopped and place < len(text):
        stopped = answer.add(text[place:])
    answer.close()
    expected, stop = by_definition(text, stops, include)
    assert answer.visible == expected
    assert answer.visible.startswith(shown)
    assert stopped == (stop is not None)
    assert answer.stopped_by == stop


def test_the_beginning_of_a_stop_string_is_held_back_and_released_when_it_was_none():
    answer = AnswerText(["END"], include=False)
    answer.add("the E")
    assert answer.visible == "the "
    answer.add("N")
    assert answer.visible == "the "
    answer.add("ough")
    assert answer.visible == "the ENough"
    assert answer.add(" EN") is False
    assert answer.add("D and more") is True
    assert answer.visible == "the ENough "


@pytest.mark.parametrize("include", [False, True])
def test_before_it_may_stop_text_is_shown_and_never_taken_back(include):
    answer = AnswerText(["xy"], include)
    assert answer.add("axyx", may_stop=False) is False
    assert answer.visible == "axyx"
    assert answer.add("y") is False  # its beginning was shown already
    assert answer.add("xy") is True
    assert answer.visible == ("axyxyxy" if include else "axyxy")
