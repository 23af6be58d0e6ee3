"""Our GPU kernels on the GPU of this machine: checked against float64, then timed. Without a GPU it says so and ends well.

    python benchmarks/device.py [--suite attention] [--out FILE.json]

Without `--out` the run is recorded as a new JSON in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SUITES = ("attention",)
SOURCES = {"attention": HERE.parent / "plugins/ad_attention/src/ad_attention/kernels"}
PACKAGES = ("torch", "triton", "numpy", "ad-core", "ad-attention")
REPLAYS = 60
"""Timed replays a call; the first few are thrown away."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES))
    parser.add_argument("--out", type=Path, help="write here only; leave benchmarks/results/ alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA")
        return 0
    ceilings = {"copy_gb_s": copy_gb_s(), "bf16_tflop_s": bf16_tflop_s()}

    def floor_us(size: int, flops: int) -> float:
        return max(size / ceilings["copy_gb_s"] / 1e3, flops / ceilings["bf16_tflop_s"] / 1e6)

    rows = [row for suite in arguments.suite for row in importlib.import_module(f"suites.{suite}").run(time_calls, floor_us)]
    result = {
        "schema": 1,
        "suite": "device",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git(),
        "kernels": {suite: source_hash(SOURCES[suite]) for suite in arguments.suite},
        "hw": hardware(),
        "sw": {"python": platform.python_version(), "cuda": torch.version.cuda} | versions(),
        "ceilings": ceilings,
        "rows": rows,
    }
    path = arguments.out or new_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    print(f"written to {path}")
    return 0 if all(row["ok"] for row in rows if not row["peer"]) else 1


def new_path(result: dict[str, Any]) -> Path:
    gpu = result["hw"]["gpu"].replace(" ", "-").lower()
    return HERE / "results" / f"{result['when'][:10]}-{gpu}-{result['git']['commit']}.json"


def time_calls(call: Callable[[int], torch.Tensor], copies: int) -> dict[str, float]:
    """Microseconds of `call(copy)`, going round the copies inside one CUDA graph: no launch gaps, and no help from the cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for copy in range(min(copies, 3)):
            call(copy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    times = [elapsed_us(graph.replay) / copies for _ in range(REPLAYS + 5)][5:]
    cuts = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "p10": cuts[0], "p90": cuts[-1], "n": len(times)}


def elapsed_us(action: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def copy_gb_s() -> float:
    """Bytes read and written by a copy of 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    best = statistics.median([elapsed_us(lambda: target.copy_(source)) for _ in range(13)][3:])
    return 2 * source.nbytes / best / 1e3


def bf16_tflop_s(n: int = 8192) -> float:
    """A square matrix product on random numbers: zeros would run faster."""
    left, right = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    best = statistics.median([elapsed_us(lambda: left @ right) for _ in range(13)][3:])
    return 2 * n**3 / best / 1e6


def hardware() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "driver": driver.stdout.strip() or None,
        "cpu": platform.processor() or platform.machine(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git() -> dict[str, Any]:
    def words(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": words("rev-parse", "--short=10", "HEAD") or "unknown", "dirty": bool(words("status", "--porcelain", "--", ".."))}


def source_hash(folder: Path) -> str:
    """Of a suite's kernel sources: tells whether a result is about the kernels that stand here."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("triton_*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        head = f"{row['case']['name']:36} {row['impl'][:28]:28} error {row['max_rel_err']:.1e}"
        numbers = f"{row['median']:9.1f} us  floor {row['floor_us']:8.1f} us  {row['fraction']:5.0%}" if row["ok"] else "WRONG: no numbers"
        print(head, numbers)


if __name__ == "__main__":
    sys.exit(main())
