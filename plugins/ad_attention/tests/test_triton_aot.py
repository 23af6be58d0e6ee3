"""The Triton kernels compiled for sm_90 on this machine, without a GPU: they compile, fit, and use what Hopper has."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: kernels are not compiled", allow_module_level=True)

from ad_attention.kernels import aot, triton_launch  # noqa: E402
from ad_attention.kernels.triton_tiles import Tiles  # noqa: E402
from ad_core.testing.triton import CompiledLaunch, compiled_launches  # noqa: E402
from ad_core.testing.triton_budget import complaints, main, measure, usage  # noqa: E402

FAST = ("bf16-d64", "bf16-d128", "bf16-d128-decode", "fp32-d64-all", "bf16-d128-selected", "bf16-mla", "bf16-select")


def variant(name: str) -> dict[str, CompiledLaunch]:
    return measure(aot.variants()[name])


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in aot.variants()])
def test_a_step_compiles_within_its_budget(name: str) -> None:
    measured = {kernel: usage(launch) for kernel, launch in variant(name).items()}
    kinds = {"mla": {"append_rows_kernel", "latent_kernel", "combine_kernel"}, "select": {"append_rows_kernel", "score_kernel"}}
    assert kinds.get(name.split("-")[1], {"append_kernel", "decode_kernel"}) <= set(measured)
    assert complaints(name, measured, aot.BUDGET) == []


@pytest.mark.parametrize("name", ["bf16-d64", "bf16-d128"])
def test_prefill_uses_warpgroup_matrix_instructions(name: str) -> None:
    assert "wgmma.mma_async" in variant(name)["prefill_kernel"].ptx


@pytest.mark.parametrize("name", ["bf16-d64", "bf16-d128", "bf16-d128-decode"])
def test_keys_and_values_are_loaded_sixteen_bytes_at_a_time(name: str) -> None:
    ptx = variant(name)["decode_kernel"].ptx
    wide = [line for line in ptx.splitlines() if "cp.async.cg.shared.global" in line and "0x10" in line]
    assert len(wide) >= 8
    assert "mma.sync" in ptx


@pytest.mark.parametrize("name", ["bf16-mla", "bf16-mla-selected"])
def test_latent_rows_are_loaded_wide_and_multiplied_by_warpgroups(name: str) -> None:
    """Once for single tokens and once for chunks; the loads are shared by both products."""
    with compiled_launches() as compiled:
        aot.variants()[name]()
    launches = [launch for launch in compiled if launch.kernel == "latent_kernel"]
    assert len(launches) == 2
    for launch in launches:
        assert "wgmma.mma_async" in launch.ptx
        assert launch.local_bytes == 0
        assert sum("cp.async.cg.shared.global" in line and "0x10" in line for line in launch.ptx.splitlines()) >= 8


def test_pure_decode_launches_no_prefill() -> None:
    assert set(variant("bf16-d128-decode")) == {"append_kernel", "decode_kernel", "combine_kernel"}


def test_a_window_that_is_one_split_needs_no_combination() -> None:
    with compiled_launches() as compiled:
        aot._step(aot.BF16, 64, T=3, modifiers=("window",), max_keys=128)
    assert [launch.kernel for launch in compiled] == ["append_kernel", "decode_kernel"]


# -- the tool itself -----------------------------------------------------------------------------------------------------


def test_a_budget_that_is_broken_is_named(tmp_path: Path) -> None:
    measured = {kernel: usage(launch) for kernel, launch in variant("bf16-d64").items()}
    budget = json.loads(aot.BUDGET.read_text()) | {"triton": triton.__version__}
    budget["kernels"]["bf16-d64"] = {kernel: dict(uses) for kernel, uses in measured.items()}
    budget["kernels"]["bf16-d64"]["decode_kernel"]["registers"] -= 1
    del budget["kernels"]["bf16-d64"]["append_kernel"]
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(budget))
    spilled = measured | {"prefill_kernel": measured["prefill_kernel"] | {"local_bytes": 8, "shared_bytes": 300_000}}
    found = "\n".join(complaints("bf16-d64", spilled, path))
    assert "decode_kernel: registers is" in found
    assert "append_kernel is not in budget.json" in found
    assert "prefill_kernel spills: 8 bytes" in found
    assert "300000 bytes of shared memory" in found


def test_the_numbers_of_another_compiler_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text(json.dumps({"triton": "0.0.0", "kernels": {}}))
    assert complaints("any", {"kernel": {"registers": 255, "local_bytes": 0, "shared_bytes": 0}}, path) == []


def test_the_command_writes_and_then_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "BUDGET", tmp_path / "budget.json")
    monkeypatch.setattr(aot, "variants", lambda: {"bf16-d64": lambda: aot._step(aot.BF16, 64)})
    assert main(["ad_attention.kernels.aot", "--write"]) == 0
    assert main(["ad_attention.kernels.aot"]) == 0
    assert "decode_kernel" in capsys.readouterr().out


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring can fail: tiles that need more than a thread's registers."""
    monkeypatch.setattr(triton_launch, "prefill_tiles", lambda *sizes: Tiles(64, 32, 4, 2))
    spilling = measure(lambda: aot._step(aot.FP32, 64))["prefill_kernel"]
    assert spilling.local_bytes > 0
