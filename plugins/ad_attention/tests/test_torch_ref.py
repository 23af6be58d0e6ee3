"""The torch kernel's own ways: those that the conformance kit's small sizes do not take, and what it promises beside the numbers."""

import numpy as np
import pytest
import torch

from ad_attention.kernels import torch_math, torch_plan
from ad_attention.kernels.torch_math import Modifiers
from ad_attention.kernels.torch_plan import BAGGED, EXACT, FUSED, NONE, SPLIT, Group, Prefill, Step
from ad_attention.kernels.torch_ref import TorchPaged
from ad_attention.mixer import Attention
from ad_attention.testing import CASES, case
from ad_core.api import Declined, Limits
from ad_core.testing import Harness, Subject, kernel_checks
from ad_core.testing.calls import symbolic_call

MIXER, KERNEL = Attention(), Attention().kernels[0]
BY_NAME = {entry.name: entry for entry in CASES}


def plan_of(harness):
    """The step and the records that the last `prepare` wrote."""
    step = Step(*harness.buffers["plan"].tolist())
    records = harness.buffers["records"].tolist()
    groups = [Group(*row[: len(Group._fields)]) for row in records[: step.groups]]
    prefills = [Prefill(*row[: len(Prefill._fields)]) for row in records[step.groups : step.groups + step.prefills]]
    return step, groups, prefills


def in_order(harness):
    """Deals pages in ascending order, as an allocator does that has just started."""
    harness.free_pages.sort(reverse=True)
    return harness


@pytest.mark.parametrize("entries", [0, 60], ids=["no room for an index", "room for some"])
@pytest.mark.parametrize("name", ["gqa", "window", "chunk", "key_bias", "window_distance_bias", "everything"])
def test_gather_indices_that_do_not_fit_are_computed_in_the_layer(monkeypatch, name, entries):
    monkeypatch.setattr(torch_plan, "MAX_ENTRIES", entries)
    for check in (kernel_checks.ragged, kernel_checks.chunks, kernel_checks.dirty_memory):
        check(Subject(MIXER, BY_NAME[name], KERNEL))


@pytest.mark.parametrize("name", ["gqa", "window_sinks", "distance_bias", "query_sinks", "everything"])
def test_groups_that_are_cut_to_one_row_each(monkeypatch, name):
    monkeypatch.setattr(torch_plan, "GROUP_BYTES", 1)
    for check in (kernel_checks.ragged, kernel_checks.decode, kernel_checks.independence):
        check(Subject(MIXER, BY_NAME[name], KERNEL))


@pytest.mark.parametrize(("limit", "shared"), [(0, 0), (0, 4), (10**9, 4)], ids=["products", "bags", "fused"])
@pytest.mark.parametrize("entry", [e for e in CASES if e.name not in ("wide_value", "window_one")], ids=lambda e: e.name)
def test_every_way_to_compute_a_half_precision_decode(monkeypatch, entry, limit, shared):
    monkeypatch.setattr(torch_plan, "BAGS_SHARED_BY", shared)
    monkeypatch.setattr(torch_plan, "SMALL_ELEMENTS", limit)
    kernel_checks.float64(Subject(MIXER, entry, KERNEL))


def test_the_way_is_chosen_by_size_dtype_and_modifiers():
    def shape(dtype, heads=4, fusable=True, on_cpu=True):
        return torch_plan.Shape(heads, 2, 64, 64, dtype, None, None, fusable, on_cpu)

    def mode(elements, viewed=False, **kind):
        return shape(**kind).mode(elements, viewed)

    assert mode(10**7, dtype=torch.float32) == EXACT
    assert mode(1000, dtype=torch.bfloat16) == FUSED
    assert mode(1000, dtype=torch.bfloat16, heads=2) == EXACT  # one query a key head: the fused kernel is slow
    assert mode(1000, dtype=torch.bfloat16, fusable=False) == EXACT
    assert mode(10**7, dtype=torch.bfloat16, on_cpu=False) == EXACT
    assert mode(10**7, dtype=torch.float16) == FUSED
    assert mode(1000, viewed=True, dtype=torch.bfloat16) == FUSED
    assert mode(10**7, viewed=True, dtype=torch.bfloat16) == EXACT
    if torch_plan._bfloat16_products_are_fast():
        assert mode(10**7, dtype=torch.bfloat16) == BAGGED
        assert mode(10**7, dtype=torch.bfloat16, heads=16) == SPLIT  # eight query heads would read each value


def test_split_products_do_not_round_scores_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*size, generator=generator).bfloat16() for size in ((8, 6, 64), (8, 2, 300, 64), (8, 2, 300, 64)))
    given = Modifiers(0.4, *[None] * 7)
    truth = torch_math.decode(q.double(), k.double(), v.double(), [], given, EXACT)
    split, exact = (torch_math.decode(q, k, v, [], given, mode).double() - truth for mode in (SPLIT, EXACT))
    scores = torch.bmm(q.view(16, 3, 64), k.view(16, 300, 64).transpose(1, 2)).float() * 0.4  # rounded to bfloat16 by the product
    rounded = torch.bmm(scores.softmax(-1).bfloat16(), v.view(16, 300, 64)).view(8, 6, 64).double() - truth
    assert split.square().mean() < 2 * exact.square().mean()
    assert rounded.square().mean() > 4 * split.square().mean()


def test_sequences_of_very_different_length_are_not_padded_to_the_longest():
    harness = Harness(MIXER, KERNEL, BY_NAME["gqa"], sequences=6, length=400, page_size=16)
    subject = Subject(MIXER, BY_NAME["gqa"], KERNEL)
    subject.follow(harness, [[(0, 390), (1, 3), (2, 5), (3, 388), (4, 2)], [(index, 1) for index in range(5)]], "mixed lengths")
    step, groups, _ = plan_of(harness)
    assert step.permuted
    assert sorted(group.length for group in groups) == [6, 391]
    assert sum(group.size for group in groups) == 5


@pytest.mark.parametrize("name", ["distance_bias", "query_sinks"])
def test_what_queries_have_of_their_own_follows_them_into_sorted_groups(name):
    harness = Harness(MIXER, KERNEL, BY_NAME[name], sequences=6, length=200, page_size=16)
    lengths = [190, 3, 5, 188, 2]
    steps = [list(enumerate(lengths)), [(index, 1) for index in range(5)]]
    Subject(MIXER, BY_NAME[name], KERNEL).follow(harness, steps, "mixed lengths")
    assert plan_of(harness)[0].permuted


def test_sequences_of_like_length_are_one_group_in_their_order():
    harness = Harness(MIXER, KERNEL, BY_NAME["gqa"], sequences=3, length=40)
    harness.step([(0, 30), (1, 28), (2, 31)])
    harness.step([(0, 1), (1, 1), (2, 1)])
    step, groups, _ = plan_of(harness)
    assert (step.permuted, [group.size for group in groups], step.size, step.masked) == (0, [3], 3, 1)


@pytest.mark.parametrize("name", ["gqa", "window", "key_bias", "distance_bias", "query_sinks", "everything"])
def test_consecutive_pages_are_read_where_they_lie(name):
    harness = in_order(Harness(MIXER, KERNEL, BY_NAME[name], sequences=1, length=24, page_size=4))
    subject = Subject(MIXER, BY_NAME[name], KERNEL)
    subject.follow(harness, [[(0, 9)]], "prefill")
    assert plan_of(harness)[0].write_start != NONE
    expected = subject.expected(harness)
    for start, count in ((9, 6), (15, 1), (16, 1), (17, 1), (18, 6)):
        harness.free_pages.sort(reverse=True)
        outputs = harness.step([(0, count)])[0]
        subject.close(outputs, [truth[0, start : start + count] for truth in expected], f"tokens {start} to {start + count}")
        if name in ("gqa", "key_bias", "distance_bias", "query_sinks"):
            step, _, prefills = plan_of(harness)
            assert (step.view_start if count == 1 else prefills[0].view_start) != NONE


def test_scattered_pages_are_not_taken_for_consecutive_ones():
    pages = np.array([5, 6, 8, 9], np.int32)
    assert torch_plan._consecutive(pages, 0, 8, 4) == 20
    assert torch_plan._consecutive(pages, 3, 5, 4) == 23
    assert torch_plan._consecutive(pages, 0, 9, 4) == NONE
    assert torch_plan._consecutive(pages, 8, 8, 4) == 32
    assert torch_plan._consecutive(np.array([6, 5], np.int32), 0, 8, 4) == NONE


def test_a_prefill_longer_than_a_block_of_rows_with_every_bias():
    for name in ("gqa", "narrow_value", "sinks", "window", "chunk", "alibi", "softcap", "far_distance_bias", "everything"):
        harness = Harness(MIXER, KERNEL, BY_NAME[name], sequences=1, length=700, page_size=16)
        Subject(MIXER, BY_NAME[name], KERNEL).follow(harness, [[(0, 300)], [(0, 400)]], name)


def test_buffers_do_not_grow_with_the_longest_sequence():
    limits = Limits(max_tokens=2048, max_sequences=256, max_model_len=131072, page_size=16)
    call = symbolic_call(MIXER, case("big", 32, 8, 128, 128), torch.bfloat16, "cpu")
    total = sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in KERNEL.buffers(call, limits).values())
    assert total < 16 << 20


def test_calls_share_a_preparation_only_if_nothing_of_it_differs():
    def key(name, dtype=torch.float32):
        return KERNEL.group_key(symbolic_call(MIXER, BY_NAME[name], dtype, "cpu"))

    assert key("gqa") == key("gqa")
    assert key("mqa") == key("mqa")
    different = ["mha", "gqa", "mqa", "wide_value", "window", "chunk", "softcap", "t5", "clip", "everything"]
    assert len({key(name) for name in different}) == len(different)
    assert key("gqa") != key("gqa", torch.bfloat16)
    given = ("key_bias", "distance_bias", "query_sinks")  # like sinks, they are given to the op and not to the preparation
    assert {key(name) for name in given} == {key("sinks")}


def test_an_unknown_rule_is_declined():
    call = symbolic_call(MIXER, BY_NAME["clip"], torch.float32, "cpu")
    wrong = type(call)(call.node, call.module, call.op, {**call.arguments, "rel_bias_rule": "swin"})
    answer = TorchPaged().supports(wrong, Subject(MIXER, BY_NAME["clip"], KERNEL).environment())
    assert isinstance(answer, Declined)
    assert "swin" in answer.reason


def test_what_is_kept_a_token():
    def resources(name):
        return MIXER.resources(symbolic_call(MIXER, BY_NAME[name], torch.bfloat16, "cpu"), {})

    kept = resources("everything")
    assert {name: (entry.per_token, entry.window) for name, entry in kept.items()} == {
        "key_pages": ((2, 16), 9),
        "value_pages": ((2, 8), 9),
        "key_bias_pages": ((2,), 9),
    }
    assert {entry.dtype for entry in kept.values()} == {torch.bfloat16}
    assert {entry.window for entry in resources("chunk").values()} == {6}
    assert {entry.window for entry in resources("gqa").values()} == {None}
    assert set(resources("gqa")) == {"key_pages", "value_pages"}
