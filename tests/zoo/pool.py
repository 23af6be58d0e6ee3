"""Entries of the zoo over a few worker processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Worker:
    """One worker process, started at the first entry. Not for two threads at once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, model_type: str, limit: float) -> dict[str, Any]:
        """The result of an entry, as plain data, after at most about `limit` seconds."""
        if self._process is None or self._process.poll() is not None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-m", "tests.zoo.worker"]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"model_type": model_type, "limit": limit}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            return {"model_type": model_type, "status": "fail", "stage": "crash", "reason": "the worker process ended"}
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(10)


def run_all(model_types: Sequence[str], jobs: int, limit: float, report: Callable[[dict[str, Any]], None]) -> None:
    """Runs every entry on one of `jobs` workers; `report` gets each result as it comes, from the worker's thread."""
    rest = list(reversed(model_types))

    def drain(_: int) -> None:
        worker = Worker()
        try:
            while rest:
                report(worker.run(rest.pop(), limit))
        finally:
            worker.close()

    with ThreadPoolExecutor(jobs) as threads:
        list(threads.map(drain, range(jobs)))
