"""The Triton kernel as the core sees it: who may choose it, what it allocates, what its source may contain, graph safety."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ad_attention.kernels import triton_paged
from ad_attention.kernels.triton_paged import TritonPaged, attention_triton
from ad_core.api import AdError, Declined, Environment, Limits, OpCall

PACKAGE = Path(triton_paged.__file__).parent.parent
LIMITS = Limits(max_tokens=64, max_sequences=8, max_model_len=4096, page_size=16)
H200 = Environment("cuda", capability=(9, 0))
NONE = dict.fromkeys(("window", "chunk", "softcap", "sinks", "alibi_slopes", "rel_bias", "key_bias"))


def call(D: int = 64, DV: int = 64, H: int = 8, G: int = 2, **options: Any) -> OpCall:
    tensors = {"query": torch.zeros(1, 4, H, D), "key": torch.zeros(1, 4, G, D), "value": torch.zeros(1, 4, G, DV)}
    return OpCall("node", "module", TritonPaged.target, {**tensors, "scale": 0.1, "rel_bias_rule": "", **NONE, **options})


# -- arbitration ---------------------------------------------------------------------------------------------------------


def test_a_gpu_is_supported() -> None:
    assert TritonPaged().supports(call(), H200) is None
    assert TritonPaged().supports(call(rel_bias=torch.zeros(8, 32), rel_bias_rule="t5:128"), H200) is None


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ({}, Environment("cpu"), "TRITON_INTERPRET=1"),
        ({}, Environment("cuda", capability=(7, 5)), "8.0"),
        ({"D": 320}, H200, "320"),
        ({"DV": 512}, H200, "512"),
        ({"rel_bias": torch.zeros(8, 32), "rel_bias_rule": "t6:1"}, H200, "t6:1"),
    ],
)
def test_a_refusal_has_its_reason(options: dict[str, Any], environment: Environment, reason: str) -> None:
    declined = TritonPaged().supports(call(**options), environment)
    assert isinstance(declined, Declined)
    assert reason in declined.reason


def test_the_descriptor_needs_no_triton() -> None:
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from ad_attention.kernels.triton_paged import TritonPaged
assert "triton" not in sys.modules
print(TritonPaged().requires)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton>=3.6" in done.stdout


# -- buffers -------------------------------------------------------------------------------------------------------------


def test_scratch_holds_every_split_of_every_row() -> None:
    specs = TritonPaged().buffers(call(), LIMITS)
    assert {name: spec.shape for name, spec in specs.items()} == {"partial_output": (8, 8, 32, 64), "partial_lse": (8, 8, 32)}


@pytest.mark.parametrize("options", [{"window": 128}, {"chunk": 100}, {"window": 1000, "chunk": 64}], ids=str)
def test_a_short_reach_needs_no_scratch(options: dict[str, int]) -> None:
    assert TritonPaged().buffers(call(**options), LIMITS) == {}


def test_calls_share_buffers_only_if_the_buffers_are_equal() -> None:
    calls = [call(), call(H=4), call(DV=32), call(window=512), call(rel_bias=torch.zeros(8, 32), rel_bias_rule="t5:128")]
    calls += [call(rel_bias=torch.zeros(8, 16), rel_bias_rule="t5:128"), call(rel_bias=torch.zeros(8, 32), rel_bias_rule="t5:64")]
    keys = [TritonPaged().group_key(each) for each in calls]
    assert len(set(keys)) == len(keys)
    assert TritonPaged().group_key(call(softcap=2.0, D=32)) == keys[0]


def test_the_rule_becomes_a_table_by_distance() -> None:
    """Four buckets up to distance 8: 0 and 1 are exact, then 2 + 2 * log(distance / 2) / log(4), worked out by hand."""
    ruled = call(rel_bias=torch.zeros(8, 4), rel_bias_rule="t5:8")
    specs = TritonPaged().buffers(ruled, LIMITS)
    table = torch.full(specs["distance_buckets"].shape, -1)
    TritonPaged().prepare(None, ruled, {"distance_buckets": table})  # type: ignore[arg-type]  # does not depend on the batch
    assert table.tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 3]
    assert "distance_buckets" not in TritonPaged().buffers(call(rel_bias=torch.zeros(8, 4), rel_bias_rule="clip"), LIMITS)


# -- source --------------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    r"tl\.dot\(": "bfloat16 is silently wrong in the interpreter: use triton_ops.dot",
    r"libdevice|inline_asm": "does not run in the interpreter",
    r"make_block_ptr|tl\.advance": "removed in later releases",
    r"warp_specialize|gluon": "not in every supported release",
    r"@triton\.autotune": "numbers would depend on timings: use triton_tiles",
    r"\.item\(|\.tolist\(|\.cpu\(|nonzero": "waits for the device",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_kernel_sources_keep_to_what_works_everywhere(pattern: str) -> None:
    paths = [path for path in PACKAGE.glob("*/triton_*.py") if not ("dot" in pattern and path.name == "triton_ops.py")]
    assert len(paths) >= 15
    found = [f"{path.name}: {line.strip()}" for path in paths for line in path.read_text().splitlines() if re.search(pattern, line)]
    assert not found, FORBIDDEN[pattern]


# -- graph safety --------------------------------------------------------------------------------------------------------


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    with pytest.raises(AdError, match="TRITON_INTERPRET=1"):
        attention_triton(*packed(4)[0], **packed(4)[1])


class NoCopiesBetweenDevices(TorchDispatchMode):
    """A CUDA graph can hold no transfer; fake tensors alone let `.cpu()` pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert len(devices) <= 1, f"{func} moves data between {devices}"
        return result


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    with FakeTensorMode():
        yield


def packed(T: int, device: str = "cpu", **options: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    B, H, G, D = 4, 8, 2, 64

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)

    named: Mapping[str, Any] = {
        "key_pages": floats(9, 16, G, D),
        "value_pages": floats(9, 16, G, D),
        "key_bias_pages": None,
        "cu_seqlens": integers(B + 1),
        "context_lens": integers(B),
        "page_table": integers(B, 8),
        "token_slots": integers(T),
        "partial_output": torch.empty(B, H, 4, D, device=device),
        "partial_lse": torch.empty(B, H, 4, device=device),
        "distance_buckets": None,
        "append": True,
        "scale": 0.1,
    }
    return (floats(1, T, H, D), floats(1, T, G, D), floats(1, T, G, D)), {**named, **options}


@pytest.mark.parametrize(("tokens", "kernels"), [(4, ["append", "decode", "combine"]), (40, ["append", "decode", "combine", "prefill"])])
@pytest.mark.usefixtures("fake_gpu")
def test_the_host_side_reads_nothing_from_the_device(tokens: int, kernels: list[str]) -> None:
    """On fake CUDA tensors, where `.item()`, `nonzero` and branches on contents raise."""
    triton_testing = pytest.importorskip("ad_core.testing.triton")
    from ad_attention.kernels import triton_launch

    rel_bias = torch.empty(8, 32, device="cuda")
    arguments, named = packed(tokens, "cuda", rel_bias=rel_bias, distance_buckets=torch.empty(129, dtype=torch.int64, device="cuda"))
    with NoCopiesBetweenDevices(), triton_testing.noted_launches() as noted:
        output = triton_launch.attention(*arguments, **named)
    assert output.shape == (1, tokens, 8, 64)
    assert [kernel for kernel, _ in noted] == [f"{kernel}_kernel" for kernel in kernels]


@pytest.mark.usefixtures("fake_gpu")
def test_the_watch_over_copies_can_fail() -> None:
    with pytest.raises(AssertionError, match="moves data"), NoCopiesBetweenDevices():
        torch.empty(4, device="cuda").cpu()


@pytest.mark.usefixtures("fake_gpu")
def test_the_fake_has_the_shape_of_the_values() -> None:
    arguments, named = packed(4, "cuda")
    wide = (*arguments[:2], torch.empty(1, 4, 2, 96, device="cuda"))
    assert attention_triton(*wide, **named).shape == (1, 4, 8, 96)
