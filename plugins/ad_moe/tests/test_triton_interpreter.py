"""Runs the Triton suite beside this file in a process of its own, with Triton's interpreter on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("triton_conformance_suite.py")
QUICK = (
    "schedule or odd_lengths and 7 or interleaved and (oracle and float32 or padding) or "
    "TestTritonLinear and (stray and float64 or apart and padding)"
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*options: str) -> None:
    """A process, because the interpreter is chosen when kernels are imported, and a wild load in it is a segmentation fault."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--import-mode=importlib", *options]
    done = subprocess.run([*command, str(SUITE)], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_kernel_is_right_in_the_interpreter() -> None:
    run("-k", QUICK)


@pytest.mark.slow
def test_the_kernel_keeps_the_contract_in_every_case() -> None:
    run()
