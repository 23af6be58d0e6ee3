"""The Triton kernels compiled for sm_90 on this machine, without a GPU: they compile, and fit."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled", allow_module_level=True)

from ad_core.testing.triton_budget import complaints, measure, usage  # noqa: E402
from ad_mamba.kernels import aot  # noqa: E402

FAST = ("bf16-scan", "bf16-ssd-n128-decode")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in aot.variants()])
def test_a_step_compiles_within_its_budget(name: str) -> None:
    measured = {kernel: usage(launch) for kernel, launch in measure(aot.variants()[name]).items()}
    wanted = (
        {"scan_kernel"} if "scan" in name else {"ssd_update_kernel"} if "decode" in name else {"ssd_update_kernel", "ssd_prefill_kernel"}
    )
    assert set(measured) == wanted
    assert complaints(name, measured, aot.BUDGET) == []
