"""A compiled C file as Python functions that take tensors' addresses and numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ad_core.api.types import Declined
from ad_core.native.compiler import CannotCompile, shared_object

_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class NativeLibrary:
    """The C file beside a kernel's module. Nothing is compiled or loaded before the first question.

    A function's signature is a string with a letter an argument: `p` an address (`tensor.data_ptr()`, 0 for none), `i` an `int64_t`,
    `f` a `float`. Its loops may be OpenMP's: they run on torch's threads, as many as `torch.get_num_threads()`.
    """

    def __init__(self, source: Path):
        self.source = source

    @property
    def declined(self) -> Declined | None:
        """Why there are no functions here; None if there are."""
        return self._loaded if isinstance(self._loaded, Declined) else None

    def function(self, name: str, signature: str) -> Callable[..., None]:
        """The C function `void name(...)`. Only where nothing is `declined`."""
        assert isinstance(self._loaded, ctypes.CDLL)
        function = getattr(self._loaded, name)
        function.restype, function.argtypes = None, [_KINDS[letter] for letter in signature]
        called: Callable[..., None] = function
        return called

    @cached_property
    def _loaded(self) -> ctypes.CDLL | Declined:
        try:
            path = shared_object(self.source)
            if (threads := _thread_library()) is None:
                return Declined("this torch does not use OpenMP, whose threads native kernels run on")
            ctypes.CDLL(threads, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
        except (CannotCompile, OSError) as error:
            return Declined(str(error))


def _thread_library() -> str | None:
    """The OpenMP library that torch has loaded into this process. Another copy would have threads of its own and fight with them."""
    import torch  # noqa: F401  (loads it)

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            return path
    return None
