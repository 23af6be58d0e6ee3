"""What a person sees while a model starts and prompts are answered. Silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Who is told what goes on. All calls come from the thread that builds or generates."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A part of the start that lasts until the context closes."""
        ...

    def counting(self, name: str, unit: str) -> AbstractContextManager[Counter]:
        """Work whose size becomes known: bytes of weights, prompts of a batch."""
        ...


class Counter(Protocol):
    def __call__(self, done: int, total: int) -> None: ...


class Silent:
    """Nobody listens."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def counting(self, name: str, unit: str) -> AbstractContextManager[Counter]:
        def count(done: int, total: int) -> None:
            return None

        return nullcontext(count)


class Bars:
    """Spinners and bars on standard error, so that output can be piped."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._console.status(name):
            yield

    @contextmanager
    def counting(self, name: str, unit: str) -> Iterator[Counter]:
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(name, total=None)

            def count(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield count
