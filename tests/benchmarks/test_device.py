"""The GPU benchmark on a machine without a GPU: it says so; and what it checks before it times, run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_skipped() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARKS / "device.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "skipped: no CUDA\n"), done.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_check_before_the_clock_passes_what_is_right_and_fails_what_is_wrong() -> None:
    program = """
import torch
from suites.attention import TOLERANCE, Case, Work, dense, exact
shape = {"H": 4, "G": 2, "D": 16}
for case in (Case("decode", ((150, 1), (3, 1)), **shape), Case("mixed", ((20, 1), (0, 40)), **shape),
             Case("window", ((150, 1),), options={"window": 10}, **shape), Case("prefill", ((0, 40),), **shape)):
    work = Work(case, "cpu", copies=2)
    assert work.error(1) <= TOLERANCE[case.dtype], (case, work.error(1))
call, error = dense(work)
assert error <= 1.6e-2 and call(1).shape == (1, 4, 40, 16)
work.scale *= 1.5
run = work.run
work.run = lambda copy: run(copy) * 1.1
assert work.error(1) > 0.05
assert work.bytes == 2 * (2 * 40 * 2 * 16 + 40 * 16 * (4 + 2 + 2 + 4)) and work.flops == 4 * 820 * 4 * 16
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
