"""The driver's side of the benchmark: starts a worker, asks it, and says why it is absent when it is."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.worker import Load

BENCHMARKS = Path(__file__).resolve().parents[1]
TASK_TIMEOUT_S = 300.0
"""Ten times what the longest task takes on two idle cores. With busy cores spin barriers collapse, and a run would take hours."""


class WorkerLost(Exception):
    """A worker that is absent, died or went silent. The text is the reason that the results show."""


class Worker:
    """A process that runs `peers/MODULE.py`. `info` is what the engine said of itself once it was ready."""

    def __init__(self, module: str, load: Load, log: Path):
        self._log = log
        self._started = time.perf_counter()
        with log.open("wb") as errors:
            # `-m` from the benchmarks folder: as a script peers/llama_cpp.py would import itself instead of the library.
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"peers.{module}", *_arguments(load)],
                cwd=BENCHMARKS,
                env=_environment(load.threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.info: dict[str, Any] = {}

    def send(self, **request: Any) -> None:
        """Sends without waiting; a worker that is still loading finds the request when it is ready.

        Raises WorkerLost if the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.receive()  # an absent engine said why before it closed the pipe
            raise WorkerLost("ended without a word") from None

    def ready(self) -> None:
        """Waits until the engine is loaded. Raises WorkerLost."""
        self.info = self.receive()["ready"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises WorkerLost."""
        self.send(**request)
        return self.receive()

    def elapsed(self) -> float:
        """Seconds since the process was launched."""
        return time.perf_counter() - self._started

    def receive(self) -> dict[str, Any]:
        """The next answer. Raises WorkerLost."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], TASK_TIMEOUT_S)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            raise WorkerLost(f"no answer for {TASK_TIMEOUT_S:.0f} s" if not readable else self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise WorkerLost(answer["absent"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'nothing on stderr'}"

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended before us
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _arguments(load: Load) -> list[str]:
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in asdict(load).items())
    return [part for pair in pairs for part in pair]


def _environment(threads: int) -> dict[str, str]:
    """Every thread pool that a library makes at import gets the same size; nothing is looked up on a network."""
    pools = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **pools, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
