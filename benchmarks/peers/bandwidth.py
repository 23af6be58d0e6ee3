"""The ceiling: what this machine reads from memory, measured by one more worker that is interleaved with the engines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from peers.worker import Load, serve

READ_BYTES = 256 * 1024 * 1024  # several times a last-level cache
PASSES = 5


@dataclass(frozen=True)
class Read:
    """The best of a few passes: what the memory can do when nobody interrupts."""

    gb_s: float


class Bandwidth:
    """Sums 256 MB of fp32 with the given number of threads."""

    def __init__(self, load: Load):
        import torch

        torch.set_num_threads(load.threads)
        self._version = torch.__version__
        self._block = torch.ones(READ_BYTES // 4)

    def read(self) -> Read:
        return Read(gb_s=READ_BYTES / min(self._pass() for _ in range(PASSES)) / 1e9)

    def info(self) -> dict[str, Any]:
        return {"version": self._version, "settings": "torch sum of 256 MB"}

    def _pass(self) -> float:
        start = time.perf_counter()
        self._block.sum()
        return time.perf_counter() - start


if __name__ == "__main__":
    serve(Bandwidth)
