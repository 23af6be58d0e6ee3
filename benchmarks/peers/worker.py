"""The worker's side of the benchmark: one engine in one process, one JSON object a line over stdin and stdout.

An engine is loaded once with a fixed number of threads, announces itself with `{"ready": info}` and then answers requests
in order: a request names a method and its arguments. Two methods are enough for every case: `one` (a single greedy request, with a
clock reading at each token) and `batch` (many at once, timed as a whole). Times are read inside the worker, so the pipe is not part
of any number.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Load:
    """What an engine is loaded for. `directory` and `gguf` hold the same bf16 weights."""

    directory: Path
    gguf: Path
    threads: int
    max_requests: int
    longest: int
    """Prompt and new tokens of the longest request that runs alone."""
    longest_in_batch: int


@dataclass
class Timed:
    """One request: its new tokens and, at each event, seconds since the request began and the new tokens there were by then."""

    tokens: list[int] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class TimedBatch:
    """Many requests at once: new tokens of each, and the seconds from the first prompt to the last token."""

    tokens: list[list[int]]
    seconds: float


class Engine(Protocol):
    """What a peer file implements. All decoding is greedy and ignores end-of-sequence tokens."""

    def one(self, prompt: list[int], new: int) -> Timed: ...

    def batch(self, prompts: list[list[int]], new: int) -> TimedBatch: ...

    def info(self) -> dict[str, Any]:
        """Version and whatever else a reader of the results should know."""
        ...


def serve(make: Callable[[Load], Any]) -> None:
    """Loads the engine that the command line describes and answers until stdin closes.

    An engine whose library is missing answers `{"absent": reason}` and ends; any other failure ends the process with its traceback
    on stderr, where the driver finds it.
    """
    answers = _claim_stdout()

    def answer(**reply: Any) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    try:
        engine = make(_parse())
    except ImportError as missing:
        answer(absent=f"cannot be imported: {missing}")
        return
    answer(ready=engine.info())
    for line in sys.stdin:
        request = json.loads(line)
        task = request.pop("task")
        if task == "peak":
            answer(peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        else:
            answer(**asdict(getattr(engine, task)(**request)))


def _claim_stdout() -> Any:
    """Keeps stdout for answers alone: what libraries print there goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _parse() -> Load:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-requests", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True)
    parser.add_argument("--longest-in-batch", type=int, required=True)
    return Load(**vars(parser.parse_args()))
