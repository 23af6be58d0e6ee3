"""The kernel in C where the conformance kit's small sizes do not take it: keys that are cut into parts for the threads, heads by fours."""

from __future__ import annotations

import pytest
import torch

from ad_attention.kernels.native_paged import LARGEST, LIBRARY
from ad_attention.mixer import Attention
from ad_attention.testing import CASES, case
from ad_core.api import Declined
from ad_core.testing import Subject, kernel_checks

pytestmark = pytest.mark.skipif(LIBRARY.declined(torch.float32) is not None, reason="no C compiler")

MIXER = Attention()
KERNEL = next(kernel for kernel in MIXER.kernels if kernel.name == "attention.softmax.native")
BY_NAME = {entry.name: entry for entry in CASES}


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["gqa", "narrow_value", "window", "sinks", "alibi", "key_bias"])
def test_long_sequences_are_cut_for_the_threads_and_joined(threads, name):
    subject = Subject(MIXER, BY_NAME[name], KERNEL)
    steps = [[(0, 300), (1, 290)], *[[(0, 1), (1, 1)]] * 12, [(0, 1)], [(1, 1)]]
    subject.follow(subject.harness(sequences=2, length=320, page_size=16), steps, f"{threads} threads")


@pytest.mark.parametrize("heads", [5, 7, 8, 13])
def test_any_number_of_query_heads_share_a_key(heads):
    for dims in ((24, 40), (64, 64), (128, 128), (72, 33)):
        entry = case(f"{heads} heads", heads, 1, *dims)
        for check in (kernel_checks.float64, kernel_checks.ragged):
            check(Subject(MIXER, entry, KERNEL))


def test_queries_that_do_not_fit_a_threads_stack_are_declined():
    answer = Subject(MIXER, case("wide", LARGEST // 64 + 1, 1, 64, 64), KERNEL).declines()
    assert isinstance(answer, Declined)
    assert "stack" in answer.reason
