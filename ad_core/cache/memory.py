"""How much memory there is and how much a step takes, measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes(peak: bool = False) -> int:
    """Resident memory of this process now, or its peak since the last reset. 0 where the system does not tell."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def available_bytes(device: torch.device) -> int:
    """Memory that could still be taken on the device; inside a container the container's limit counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    available = 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 << 30  # a system that does not tell gets a cautious guess
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit.isdigit():
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass  # not in a limited group: what the machine says stands
    return max(available, 0)


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `run` takes at its peak above what was held before. None where that cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    try:
        _CLEAR.write_text("5")  # resets the peak that the kernel keeps
    except OSError:
        run()
        return None
    before = resident_bytes()
    run()
    return max(0, resident_bytes(peak=True) - before)
