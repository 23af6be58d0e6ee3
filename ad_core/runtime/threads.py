"""Where the start of a model computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_own_thread(work: Callable[[], Result], name: str) -> Result:
    """Runs `work` in a thread that ends with it, and gives its result or raises its error.

    Every thread that computes keeps a pool of OpenMP threads for as long as it lives. Two pools are more threads than cores, and
    then OpenMP puts threads to sleep between the parallel parts of a step instead of letting them spin: measured on two
    cores, a small matrix product takes two to three times as long. A start that ran in the caller's thread would leave such a pool
    beside the engine's.
    """
    outcome: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # handed to the caller, whatever it is
            errors.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]
