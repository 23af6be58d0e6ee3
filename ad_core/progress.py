"""What a person sees while a model starts and prompts are answered. Silent unless somebody listens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol


def megabytes(count: float) -> str:
    """Bytes for people: 1.5 GiB, 256.7 MiB, 22.5 KiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def memory_words(memory: Mapping[str, int]) -> list[str]:
    """The entries of a plan's ledger, as they are printed."""
    return [f"{name} {value:,}" if name == "cache tokens" else f"{name} {megabytes(value)}" for name, value in memory.items()]


class Progress(Protocol):
    """Who is told what goes on. All calls come from the thread that builds or generates."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A part of the start that lasts until the context closes."""
        ...

    def counting(self, name: str, unit: str) -> AbstractContextManager[Counter]:
        """Work whose size becomes known: bytes of weights, prompts of a batch."""
        ...

    def say(self, line: str) -> None:
        """A result that stays: what the start took."""
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

    def say(self, line: str) -> None:
        return None


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

    def say(self, line: str) -> None:
        self._console.print(line, style="dim", highlight=False, markup=False)
