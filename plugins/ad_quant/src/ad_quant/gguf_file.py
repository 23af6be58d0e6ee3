"""Reading a GGUF file: its metadata and where its tensors lie, at once; their values, a piece at a time.

The `gguf` package's own reader takes seconds for a vocabulary (it makes numpy views of every string); here strings of arrays are skipped.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ad_core.api.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8
_PIECE = 1 << 19
"""Elements unpacked at a time: their float32 values and the temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class ArrayOfStrings:
    """An array whose strings were skipped: only their number is known."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch's order, slowest first."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    nbytes: int

    @property
    def quantised(self) -> bool:
        """Whether it is stored in blocks rather than as plain numbers."""
        return self.kind.name not in ("F64", "F32", "F16", "BF16")


class GgufFile:
    """An opened file: `metadata` by key and `tensors` in file order. Raises `CheckpointError` if it is no whole GGUF file."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read(_Cursor(data))
        except (struct.error, ValueError, IndexError, OverflowError, OSError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        end = max((tensor.start + tensor.nbytes for tensor in self.tensors), default=0)
        if end > self.size:
            cut = next(tensor.name for tensor in self.tensors if tensor.start + tensor.nbytes > self.size)
            raise self._damaged(f"its tensors take {end} bytes and the file has {self.size}: it ends before or in {cut!r}")

    def rows(self, tensor: GgufTensor) -> Iterator[tuple[slice, np.ndarray[Any, Any]]]:
        """The values as float32, some rows at a time: (which rows of the tensor as [rows, last dimension], values)."""
        width = tensor.shape[-1] if tensor.shape else 1
        count = prod(tensor.shape) // width
        stride = tensor.nbytes // count
        step = max(1, _PIECE // width)
        with self.path.open("rb") as file:
            for begin in range(0, count, step):
                rows = min(step, count - begin)
                packed = np.empty((1, rows * stride), np.uint8)  # as one row: the package goes over rows in a Python loop
                if os.preadv(file.fileno(), [packed.data], tensor.start + begin * stride) != packed.size:
                    raise self._damaged(f"it ends inside the tensor {tensor.name!r}")
                yield slice(begin, begin + rows), gguf.dequantize(packed, tensor.kind).reshape(rows, width)

    def array(self, tensor: GgufTensor) -> np.ndarray[Any, Any]:
        """The whole tensor as float32."""
        values = np.empty((prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.shape else (1, 1), np.float32)
        for rows, piece in self.rows(tensor):
            values[rows] = piece
        return values.reshape(tensor.shape)

    def read(self, tensor: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor in `dtype`: no more than a piece of it is ever there in float32."""
        target = torch.empty(tensor.shape, dtype=dtype)
        flat = target.view(-1, tensor.shape[-1] if tensor.shape else 1)
        for rows, piece in self.rows(tensor):
            flat[rows] = torch.from_numpy(piece)
        return target

    def _read(self, cursor: _Cursor) -> None:
        if bytes(cursor.take(4)) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ValueError(f"it is of GGUF version {version}, and 2 and 3 are read")
        tensors, entries = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        infos = [cursor.tensor_info() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-cursor.position // alignment) * alignment
        self.tensors: list[GgufTensor] = []
        for name, shape, kind, offset in infos:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            if (shape[-1] if shape else 1) % block:
                raise ValueError(f"the rows of {name!r} ({list(shape)}) are no multiple of {block}, the block of {kind.name}")
            self.tensors.append(GgufTensor(name, shape, kind, base + offset, prod(shape) // block * width))

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name} is no whole GGUF file", where=str(self.path), why=why, hint="it is damaged or truncated: fetch it again"
        )


class _Cursor:
    """Reads forward through the header."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, count: int) -> memoryview | bytes:
        if count < 0 or self.position + count > len(self.data):
            raise ValueError(f"the header goes on past the end of the file, at byte {self.position}")
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return value

    def string(self) -> str:
        return bytes(self.take(self.scalar("Q"))).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a metadata value is of the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            return np.frombuffer(self.take(count * width), np.dtype(_SCALARS[inner]).newbyteorder("<")).tolist()
        if inner == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
            return ArrayOfStrings(count)
        raise ValueError(f"a metadata array holds values of the type {inner}")

    def tensor_info(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name, dims = self.string(), self.scalar("I")
        if dims > _MAX_DIMS:
            raise ValueError(f"the tensor {name!r} has {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        if not all(shape):
            raise ValueError(f"the tensor {name!r} is empty")
        return name, shape, gguf.GGMLQuantizationType(self.scalar("I")), self.scalar("Q")
