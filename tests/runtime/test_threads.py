"""Work in a thread of its own."""

from __future__ import annotations

import threading

import pytest

from ad_core.runtime.threads import in_own_thread


def test_the_result_comes_back_from_a_thread_that_has_ended():
    seen = in_own_thread(threading.current_thread, "a start")
    assert seen.name == "a start"
    assert seen is not threading.current_thread()
    assert not seen.is_alive()


def test_an_error_is_raised_as_it_is():
    error = LookupError("where")

    def fail() -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        in_own_thread(fail, "a start")
    assert caught.value is error
