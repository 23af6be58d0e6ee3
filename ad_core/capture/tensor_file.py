"""Reading one safetensors file: into memory of our own, in pieces, converting on the way.

The file is not mapped. A mapped file that is replaced or truncated kills the process; its pages count as ours once they are touched;
and its tensors begin at any multiple of eight bytes, where matrix kernels want 64. Reading costs one copy of the weights, about a second
for two gigabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ad_core.api.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE = 1 << 20
"""Bytes read at a time when the dtype changes on the way. Few: the holes that larger ones leave between tensors add up."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in new memory. Raises `CheckpointError` if the file ends before it does."""
        target = torch.empty(self.shape, dtype=dtype or self.dtype)
        with _opened(self.file) as handle:
            if target.dtype == self.dtype:
                self._fill(handle, _bytes(target), self.start)
                return target
            flat, width = target.view(-1), self.dtype.itemsize
            piece = torch.empty(min(max(_PIECE // width, 1), flat.numel()), dtype=self.dtype)
            for begin in range(0, flat.numel(), max(len(piece), 1)):
                part = piece[: min(len(piece), flat.numel() - begin)]
                self._fill(handle, _bytes(part), self.start + begin * width)
                flat[begin : begin + len(part)] = part
        return target

    def _fill(self, handle: int, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(handle, [buffer[done : done + (1 << 30)]], offset + done)
            if not count:
                raise CheckpointError(
                    f"the file ends inside the tensor {self.name!r}", where=str(self.file), hint="the file is truncated: fetch it again"
                )
            done += count


class TensorFile:
    """The header of a safetensors file. Raises `CheckpointError` if it, or the file's length, is not what the format wants."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks the header, the offsets and the length of the file
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path.name} is no whole safetensors file",
                where=str(path),
                why=f"{error} (the file has {path.stat().st_size if path.exists() else 0} bytes)",
                hint="it is damaged or truncated: fetch it again",
            ) from error
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{name!r} is stored as {entry['dtype']}, which is not supported", where=str(path))
            begin, end = entry["data_offsets"]
            self.tensors[name] = StoredTensor(path, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin, end - begin)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be opened", where=str(path), why=str(error)) from error
    try:
        yield handle
    finally:
        os.close(handle)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]
