"""The Triton kernels of latent and sparse attention as the core sees them: who may choose them, what they allocate, graph safety."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ad_attention.latent.mixer import LatentAttention
from ad_attention.latent.triton_kernel import TritonLatent, mla_triton
from ad_attention.sparse.mixer import Select, Selected
from ad_attention.sparse.triton_select import TritonSelect, select_triton
from ad_attention.sparse.triton_selected import TritonSelected, selected_triton
from ad_core.api import AdError, Declined, Environment, Kernel, Limits, OpCall

LIMITS = Limits(max_tokens=64, max_sequences=8, max_model_len=4096, page_size=16)
H200 = Environment("cuda", capability=(9, 0))
BF16 = torch.bfloat16


def latent(*, H: int = 16, R: int = 512, P: int = 64, dtype: torch.dtype = BF16, count: int | None = None, **options: Any) -> OpCall:
    shapes = {"q_nope": (1, 4, H, 128), "q_rope": (1, 4, H, P), "latent": (1, 4, R), "k_rope": (1, 4, P), "up_weight": (H * 256, R)}
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    chosen = None if count is None else torch.empty(1, 4, count, dtype=torch.int64, device="meta")
    return OpCall("n", "m", TritonLatent.target, {**tensors, "scale": 0.1, "window": None, "sinks": None, "selected": chosen, **options})


def selected(D: int = 64, count: int = 2048) -> OpCall:
    query, key, chosen = torch.zeros(1, 4, 8, D), torch.zeros(1, 4, 2, D), torch.zeros(1, 4, count, dtype=torch.int64)
    arguments = {"query": query, "key": key, "value": key, "selected": chosen, "scale": 0.1, "sinks": None}
    return OpCall("n", "m", TritonSelected.target, arguments)


def indexer(heads: int = 64, dim: int = 128, every: int = 1) -> OpCall:
    tensors = {"query": torch.zeros(1, 4, heads, dim), "key": torch.zeros(1, 4, dim), "weight": torch.zeros(1, 4, heads)}
    return OpCall("n", "m", TritonSelect.target, {**tensors, "count": 4, "scale": 0.1, "every": every})


CALLS: list[tuple[Kernel, OpCall]] = [(TritonLatent(), latent()), (TritonSelected(), selected()), (TritonSelect(), indexer())]


@pytest.mark.parametrize(("kernel", "call"), CALLS, ids=lambda each: getattr(each, "name", ""))
def test_a_gpu_is_supported_and_a_cpu_is_not(kernel: Kernel, call: OpCall) -> None:
    assert kernel.supports(call, H200) is None
    for environment, reason in ((Environment("cpu"), "TRITON_INTERPRET=1"), (Environment("cuda", capability=(7, 5)), "8.0")):
        declined = kernel.supports(call, environment)
        assert isinstance(declined, Declined)
        assert reason in declined.reason


@pytest.mark.parametrize(
    ("kernel", "call", "reason"),
    [
        (TritonLatent(), latent(R=640), "640"),
        (TritonLatent(), latent(P=192), "192"),
        (TritonLatent(), latent(up_weight=torch.empty(4096, 512, device="meta")), "bfloat16, float32"),
        (TritonSelected(), selected(D=320), "320"),
        (TritonSelect(), indexer(heads=256), "256"),
        (TritonSelect(), indexer(every=4), "blocks of 4"),
    ],
)
def test_a_refusal_has_its_reason(kernel: Kernel, call: OpCall, reason: str) -> None:
    declined = kernel.supports(call, H200)
    assert isinstance(declined, Declined)
    assert reason in declined.reason


def test_each_mixer_has_both_kernels() -> None:
    names = [[kernel.name for kernel in mixer.kernels] for mixer in (LatentAttention(), Select(), Selected())]
    assert names == [[f"attention.{op}.torch", f"attention.{op}.triton"] for op in ("mla", "select", "selected")]


# -- buffers -------------------------------------------------------------------------------------------------------------


def test_scratch_holds_every_split_of_every_row() -> None:
    shapes = {name: spec.shape for name, spec in TritonLatent().buffers(latent(), LIMITS).items()}
    assert shapes == {"partial_output": (8, 16, 32, 512), "partial_lse": (8, 16, 32)}
    assert TritonLatent().buffers(latent(count=2048), LIMITS)["partial_lse"].shape == (8, 16, 16)
    assert TritonSelected().buffers(selected(), LIMITS)["partial_output"].shape == (8, 8, 16, 64)


def test_a_short_reach_needs_no_scratch() -> None:
    assert TritonLatent().buffers(latent(window=128), LIMITS) == {}
    assert TritonSelected().buffers(selected(count=64), LIMITS) == {}


def test_many_sequences_of_many_heads_get_fewer_splits() -> None:
    many = Limits(max_tokens=8192, max_sequences=256, max_model_len=1 << 17, page_size=16)
    spec = TritonLatent().buffers(latent(H=128), many)["partial_output"]
    assert spec.shape == (256, 128, 4, 512)


def test_calls_share_buffers_only_if_the_buffers_are_equal() -> None:
    calls = [latent(), latent(H=8), latent(R=256), latent(window=512), latent(count=2048), latent(count=1024)]
    keys = [TritonLatent().group_key(each) for each in calls]
    assert len(set(keys)) == len(keys)
    assert len({TritonSelected().group_key(each) for each in (selected(), selected(D=32), selected(count=512))}) == 3


# -- graph safety --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    with FakeTensorMode():
        yield


def fields(T: int, device: str) -> dict[str, Any]:
    sizes = {"cu_seqlens": (5,), "context_lens": (4,), "page_table": (4, 8), "token_slots": (T,)}
    return {name: torch.empty(size, dtype=torch.int32, device=device) for name, size in sizes.items()} | {"append": True, "scale": 0.1}


def mla_arguments(T: int, device: str = "cpu", count: int | None = None) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    def floats(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    scratch = {"partial_output": floats(4, 8, 4, 32, dtype=torch.float32), "partial_lse": floats(4, 8, 4, dtype=torch.float32)}
    chosen = None if count is None else torch.empty(1, T, count, dtype=torch.int64, device=device)
    tokens = floats(1, T, 8, 16), floats(1, T, 8, 16), floats(1, T, 32), floats(1, T, 16), floats(8 * 40, 32)
    return tokens, fields(T, device) | scratch | {"latent_pages": floats(9, 16, 48), "selected": chosen}


@pytest.mark.parametrize("count", [None, 300])
@pytest.mark.parametrize(
    ("tokens", "kernels"), [(4, ["append_rows", "latent", "combine"]), (40, ["append_rows", "latent", "combine", "latent"])]
)
@pytest.mark.usefixtures("fake_gpu")
def test_latent_attention_reads_nothing_from_the_device(tokens: int, kernels: list[str], count: int | None) -> None:
    """On fake CUDA tensors, where `.item()`, `nonzero` and branches on contents raise."""
    triton_testing = pytest.importorskip("ad_core.testing.triton")
    from ad_attention.latent import triton_launch

    arguments, named = mla_arguments(tokens, "cuda", count)
    with triton_testing.noted_launches() as noted:
        output = triton_launch.latent_attention(*arguments, **named)
    assert output.shape == mla_triton(*arguments, **named).shape == (1, tokens, 8, 24)
    assert [kernel for kernel, _ in noted] == [f"{kernel}_kernel" for kernel in kernels]


@pytest.mark.usefixtures("fake_gpu")
def test_the_indexer_reads_nothing_from_the_device() -> None:
    triton_testing = pytest.importorskip("ad_core.testing.triton")
    from ad_attention.sparse import triton_launch

    query, key, weight = (torch.empty(1, 40, *shape, dtype=BF16, device="cuda") for shape in ((32, 64), (64,), (32,)))
    pages = torch.empty(9, 16, 64, dtype=BF16, device="cuda")
    with triton_testing.noted_launches() as noted:
        chosen = triton_launch.select(query, key, weight, count=7, index_pages=pages, **fields(40, "cuda"))
    assert (chosen.shape, chosen.dtype) == ((1, 40, 7), torch.int64)
    assert [kernel for kernel, _ in noted] == ["append_rows_kernel", "score_kernel"]


@pytest.mark.usefixtures("fake_gpu")
def test_a_chunk_with_choices_goes_row_by_row() -> None:
    triton_testing = pytest.importorskip("ad_core.testing.triton")
    from ad_attention.kernels import triton_launch

    query, key = (torch.empty(1, 40, heads, 64, dtype=BF16, device="cuda") for heads in (8, 2))
    pages = torch.empty(9, 16, 2, 64, dtype=BF16, device="cuda")
    named = fields(40, "cuda") | {"key_pages": pages, "value_pages": pages, "key_bias_pages": None, "distance_buckets": None}
    scratch = {"partial_output": torch.empty(4, 8, 3, 64, device="cuda"), "partial_lse": torch.empty(4, 8, 3, device="cuda")}
    chosen = torch.empty(1, 40, 300, dtype=torch.int64, device="cuda")
    with triton_testing.noted_launches() as noted:
        triton_launch.attention(query, key, key, selected=chosen, **named, **scratch)
    assert [kernel for kernel, _ in noted] == [f"{kernel}_kernel" for kernel in ("append", "decode", "combine", "decode")]


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter is on")
    arguments, named = mla_arguments(4)
    with pytest.raises(AdError, match="TRITON_INTERPRET=1"):
        mla_triton(*arguments, **named)
    query, key, weight = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 16), torch.zeros(1, 4, 8)
    common = fields(4, "cpu")
    with pytest.raises(AdError, match="TRITON_INTERPRET=1"):
        select_triton(query, key, weight, count=2, index_pages=torch.zeros(9, 16, 16), **common)
    chosen, pages = torch.zeros(1, 4, 3, dtype=torch.int64), torch.zeros(9, 16, 8, 16)
    more = {"key_pages": pages, "value_pages": pages.clone(), "partial_output": None, "partial_lse": None}
    with pytest.raises(AdError, match="TRITON_INTERPRET=1"):
        selected_triton(query, query, query, chosen, **more, **common)
