"""The Triton kernels compiled for sm_90 on this machine, without a GPU: they compile, fit, and use what Hopper has."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled", allow_module_level=True)

from ad_core.testing.triton_budget import complaints, measure, usage  # noqa: E402
from ad_moe.kernels import aot  # noqa: E402

FAST = ("bf16-decode", "bf16-prefill", "bf16-linear-decode")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in aot.variants()])
def test_a_step_compiles_within_its_budget(name: str) -> None:
    launches = measure(aot.variants()[name])
    assert set(launches) == ({"down_kernel"} if "linear" in name else {"up_kernel", "down_kernel"})
    assert complaints(name, {kernel: usage(launch) for kernel, launch in launches.items()}, aot.BUDGET) == []


def test_prefill_uses_warpgroup_matrix_instructions() -> None:
    for launch in (*measure(aot.variants()["bf16-prefill"]).values(), *measure(aot.variants()["bf16-linear-prefill"]).values()):
        assert "wgmma.mma_async" in launch.ptx


def test_weights_are_loaded_sixteen_bytes_at_a_time() -> None:
    for launch in measure(aot.variants()["bf16-decode"]).values():
        wide = [line for line in launch.ptx.splitlines() if "cp.async.cg.shared.global" in line and "0x10" in line]
        assert len(wide) >= 8
        assert "mma.sync" in launch.ptx
