"""The ceilings: what this machine reads from memory, and how fast torch computes a model's linear layers and nothing else.

One more worker that is interleaved with the engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers.worker import Load, serve

READ_BYTES = 256 * 1024 * 1024  # several times a last-level cache
PASSES = 5


@dataclass(frozen=True)
class Read:
    """The best of a few passes: what the memory can do when nobody interrupts."""

    gb_s: float


@dataclass(frozen=True)
class Linears:
    """Tokens a second that one request would get if nothing but linear layers took time; the best of a few passes."""

    tokens_s: float


class Ceiling:
    """Reads 256 MB of fp32, or multiplies one row by every weight, with the given number of threads."""

    def __init__(self, load: Load):
        import torch

        torch.set_num_threads(load.threads)
        self._torch = torch
        self._block = torch.ones(READ_BYTES // 4)
        self._layers: list[tuple[Any, Any]] = []
        """A weight and a row for it, in bf16. Each weight has memory of its own, as in a model."""

    def read(self) -> Read:
        return Read(gb_s=READ_BYTES / _best(self._block.sum) / 1e9)

    def linears(self, shapes: list[list[int]]) -> Linears:
        """`shapes`: (out, in) of each weight that a token is multiplied with, in order; the same ones at every call."""
        if not self._layers:
            row = {inner: self._torch.randn(1, inner, dtype=self._torch.bfloat16) for _, inner in shapes}
            self._layers = [(self._torch.randn(outer, inner).bfloat16(), row[inner]) for outer, inner in shapes]
        return Linears(tokens_s=1 / _best(self._multiply))

    def info(self) -> dict[str, Any]:
        return {"version": self._torch.__version__, "settings": "torch sum of 256 MB; torch linear of one row, bf16"}

    def _multiply(self) -> None:
        with self._torch.inference_mode():
            for weight, row in self._layers:
                self._torch.nn.functional.linear(row, weight)


def _best(action: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(seconds() for _ in range(PASSES))


if __name__ == "__main__":
    serve(Ceiling)
