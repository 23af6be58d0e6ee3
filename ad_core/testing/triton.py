"""Triton kernels on a machine without a GPU: a stand-in driver, and launches that compile or are only noted down.

For any plugin's tests. Importing this module needs triton; the interpreter (`TRITON_INTERPRET=1`) must be off, since whether a
kernel is compiled or interpreted is decided when its module is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ad_core.api.errors import ConfigError

HOPPER = 90
SHARED_LIMIT = 227 * 1024
"""Shared memory that one program may have on Hopper, in bytes."""


class StubDriver:
    """What Triton asks of a device before it launches, answered with an H200's figures."""

    def __init__(self, arch: int = HOPPER):
        self.arch = arch
        self.utils = self

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": 132, "max_shared_mem": SHARED_LIMIT, "max_num_regs": 65536, "warpSize": 32}

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """An autotuner that asks hears that all configurations are equally fast."""
        return lambda *args, **kwargs: [1.0, 1.0, 1.0]

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: torch.Tensor) -> None:
        pass


@dataclass(frozen=True)
class CompiledLaunch:
    """One kernel as it was compiled for one launch. Sizes are bytes, `local_bytes` a thread's spills and stack."""

    kernel: str
    num_warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str


@contextmanager
def stub_gpu(arch: int = HOPPER) -> Iterator[None]:
    """While open, Triton believes in a GPU, and keeps what it compiles in a temporary folder that later runs find again."""
    before = driver._active
    cache = Path(tempfile.gettempdir()) / f"triton-stub-{os.getuid()}"
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        driver.set_active(StubDriver(arch))
        try:
            yield
        finally:
            driver._active = before


@contextmanager
def compiled_launches(arch: int = HOPPER) -> Iterator[list[CompiledLaunch]]:
    """While open, every `kernel[grid](...)` compiles for `arch` exactly as it would for that launch, and does not run.

    Yields the list that grows by one entry a launch. Arguments may be CPU tensors; outputs stay unwritten.
    """
    compiled: list[CompiledLaunch] = []

    def compile_only(function: JITFunction, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        kernel = run(function, *args, **kwargs | {"warmup": True})
        registers, local = resource_usage(kernel.asm["cubin"])
        meta = kernel.metadata
        compiled.append(CompiledLaunch(function.fn.__name__, meta.num_warps, registers, local, meta.shared, kernel.asm["ptx"]))

    with stub_gpu(arch), _intercepted(compile_only):
        yield compiled


@contextmanager
def noted_launches() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """While open, launches are only noted down as (kernel, grid): for host code that runs on fake tensors."""
    noted: list[tuple[str, tuple[int, ...]]] = []

    def note(function: JITFunction, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        noted.append((function.fn.__name__, tuple(kwargs["grid"])))

    with stub_gpu(), _intercepted(note):
        yield noted


@contextmanager
def _intercepted(instead: Callable[[JITFunction, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    if triton.knobs.runtime.interpret:
        raise ConfigError("kernels cannot be compiled while Triton's interpreter is on", hint="unset TRITON_INTERPRET in this process")
    run = JITFunction.run
    touched: list[JITFunction] = []

    def replaced(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        touched.append(self)
        return instead(self, run, args, kwargs)

    JITFunction.run = replaced
    try:
        yield
    finally:
        JITFunction.run = run
        for function in touched:  # what was compiled for the stand-in must not be launched on a real device
            function.device_caches.clear()


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) of the one kernel in a cubin, read by Triton's own cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise ConfigError("cuobjdump's report was not understood", why=text.strip()[:400])
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)
