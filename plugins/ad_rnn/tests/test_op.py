"""The canonical ops against what they mean, in float64."""

from __future__ import annotations

import pytest
import torch

from ad_core.testing.calls import invoke
from ad_rnn.rg_lru import rg_lru
from ad_rnn.testing import RG_LRU_CASES, WKV4_CASES
from ad_rnn.token_shift import token_shift
from ad_rnn.wkv4 import wkv4

from . import oracle

LENGTHS = [1, 2, 7, 63, 100]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", RG_LRU_CASES, ids=lambda case: case.name)
def test_rg_lru_is_the_recurrence(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    torch.testing.assert_close(invoke(rg_lru, arguments)[0], oracle.rg_lru(**arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", WKV4_CASES, ids=lambda case: case.name)
def test_wkv4_is_a_softmax_over_the_past(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    torch.testing.assert_close(invoke(wkv4, arguments)[0], oracle.wkv4(**arguments), rtol=1e-9, atol=1e-11)


def test_token_shift_gives_the_token_before():
    x = torch.randn(2, 9, 5)
    shifted = token_shift(x)
    assert torch.equal(shifted[:, 1:], x[:, :-1])
    assert not shifted[:, 0].any()


def test_float32_stays_close_over_many_tokens():
    for op, cases, truth in ((rg_lru, RG_LRU_CASES, oracle.rg_lru), (wkv4, WKV4_CASES, oracle.wkv4)):
        for case in cases:
            arguments = case.arguments(1, 500, torch.float32)
            expected = truth(**{name: x.double() for name, x in arguments.items()})
            assert (invoke(op, arguments)[0].double() - expected).abs().max() < 1e-5 * expected.abs().max(), case.name
