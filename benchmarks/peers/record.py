"""What every result says beside its numbers: commit, machine, versions; and the file that it goes to."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peers.client import BENCHMARKS

RESULTS = BENCHMARKS / "results"


def git() -> dict[str, Any]:
    """The commit, and whether what is measured differs from it."""

    def answer(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=BENCHMARKS, capture_output=True, text=True).stdout.strip()

    code = ("../ad_core", "../plugins", "cpu.py", "mixers.py", "peers")
    return {"commit": answer("rev-parse", "--short=10", "HEAD") or "unknown", "dirty": bool(answer("status", "--porcelain", "--", *code))}


def hardware() -> dict[str, Any]:
    """The processor, its instructions for products, cores and memory."""
    fields = [line.partition(":")[::2] for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    known: dict[str, str] = {key.strip(): value.strip() for key, value in fields}
    features = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"} & set(known.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": known.get("model name", platform.processor()),
        "family": f"{known.get('cpu family', '?')}/{known.get('model', '?')}",
        "ncores": os.cpu_count(),
        "features": sorted(features),
        "mem_gb": round(memory / 2**30, 1),
    }


def versions(*names: str) -> dict[str, str]:
    """Of packages; "absent" of those that are not installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def new_path(result: Mapping[str, Any]) -> Path:
    """A file of its own for each run: results are only ever added."""
    stem = f"{result['when'][:10]}-{result['suite']}-{result['git']['commit']}"
    names = itertools.chain([f"{stem}.json"], (f"{stem}-{number}.json" for number in itertools.count(2)))
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())
