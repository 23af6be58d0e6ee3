"""A compiled C file as Python functions that take tensors' addresses and numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ad_core.api.types import Declined
from ad_core.native.compiler import CannotCompile, shared_object

if TYPE_CHECKING:
    import torch

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class NativeLibrary:
    """The C file beside a kernel's module, compiled for each dtype that is asked for. Nothing is compiled or loaded before.

    A function's signature is a string with a letter an argument: `p` an address (`tensor.data_ptr()`, 0 for none), `i` an `int64_t`,
    `f` a `float`. Its loops may be OpenMP's: they run on torch's threads, as many as `torch.get_num_threads()`. The source sees the
    dtype as `KIND`; what it may include is in `ad_native.h`.
    """

    def __init__(self, source: Path):
        self.source = source
        self._loaded: dict[torch.dtype, ctypes.CDLL | Declined] = {}

    def declined(self, dtype: torch.dtype) -> Declined | None:
        """Why there are no functions for tensors of `dtype` here; None if there are."""
        return loaded if isinstance(loaded := self._load(dtype), Declined) else None

    def function(self, name: str, signature: str, dtype: torch.dtype) -> Callable[..., None]:
        """The C function `void name(...)`. Only where nothing is `declined`."""
        loaded = self._load(dtype)
        assert isinstance(loaded, ctypes.CDLL)
        function = getattr(loaded, name)
        function.restype, function.argtypes = None, [_TYPES[letter] for letter in signature]
        called: Callable[..., None] = function
        return called

    def _load(self, dtype: torch.dtype) -> ctypes.CDLL | Declined:
        if dtype not in self._loaded:
            try:
                self._loaded[dtype] = _open(self.source, dtype)
            except (CannotCompile, OSError) as error:
                self._loaded[dtype] = Declined(str(error))
        return self._loaded[dtype]


def _open(source: Path, dtype: torch.dtype) -> ctypes.CDLL:
    import torch

    kinds = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}
    if dtype not in kinds:
        raise CannotCompile(f"kernels in C do not know {dtype}")
    path = shared_object(source, kinds[dtype])
    if (threads := _thread_library()) is None:
        raise CannotCompile("this torch does not use OpenMP, whose threads native kernels run on")
    ctypes.CDLL(threads, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _thread_library() -> str | None:
    """The OpenMP library that torch has loaded into this process. Another copy would have threads of its own and fight with them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            return path
    return None
