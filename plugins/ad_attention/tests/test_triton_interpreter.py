"""Runs the Triton suites beside this file in processes of their own, with Triton's interpreter on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK = "everything and (cached_op or supports or float64 or padding or mutation or dirty_memory or independence)"
QUICK_LATENT = (
    "TestLatent and (selected_sinks and (cached_op or float64 or padding) or window_sinks and float64) or "
    "TestSelected and sinks and (cached_op or float64) or few and (cached_op or float64) or equal_scores or side_by_side or "
    "merged and sinks"
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(suite: str, *options: str) -> None:
    """A process, because the interpreter is chosen when kernels are imported, and a wild load in it is a segmentation fault."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--import-mode=importlib", *options]
    done = subprocess.run([*command, str(HERE / suite)], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_kernels_are_right_in_the_interpreter() -> None:
    run("triton_interpreter_suite.py")


def test_the_kernel_keeps_the_contract() -> None:
    run("triton_conformance_suite.py", "-k", QUICK)


def test_latent_and_sparse_attention_keep_the_contract() -> None:
    run("triton_latent_suite.py", "-k", QUICK_LATENT)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["triton_conformance_suite.py", "triton_latent_suite.py"])
def test_the_kernels_keep_the_contract_in_every_case(suite: str) -> None:
    run(suite)
