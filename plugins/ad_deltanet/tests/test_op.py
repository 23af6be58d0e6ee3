"""The canonical ops against the recurrence written out step by step in float64."""

from __future__ import annotations

import pytest
import torch

from ad_core.testing.calls import invoke
from ad_deltanet.chunked import BLOCK, CHUNK, delta_rule
from ad_deltanet.op import gated_delta, kda
from ad_deltanet.testing import GATED_CASES, KDA_CASES

from .oracle import recurrence


@pytest.mark.parametrize("length", [1, 7, BLOCK, 63, CHUNK, CHUNK + 1, 100, 3 * CHUNK])
@pytest.mark.parametrize("case", GATED_CASES, ids=lambda case: case.name)
def test_gated_delta_is_the_recurrence(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    expected, _ = recurrence(**arguments)
    torch.testing.assert_close(invoke(gated_delta, arguments)[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, BLOCK, 63, CHUNK, CHUNK + 1, 100, 3 * CHUNK])
@pytest.mark.parametrize("case", KDA_CASES, ids=lambda case: case.name)
def test_kda_is_the_recurrence(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    expected, _ = recurrence(**arguments)
    torch.testing.assert_close(invoke(kda, arguments)[0], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [*GATED_CASES, *KDA_CASES], ids=lambda case: case.name)
def test_float32_stays_close_over_many_chunks(case):
    arguments = case.arguments(1, 300, torch.float32)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    op = kda if case in KDA_CASES else gated_delta
    expected, _ = recurrence(**exact)
    assert (invoke(op, arguments)[0].double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_calls_that_are_cut_anywhere_give_what_one_gives():
    draw = torch.Generator().manual_seed(0)
    length = 6 * CHUNK + 7
    query, key = (torch.nn.functional.normalize(torch.randn(2, length, 4, generator=draw).double(), dim=-1) for _ in range(2))
    value, beta = torch.randn(2, length, 4, generator=draw).double(), torch.rand(2, length, 1, generator=draw).double()
    decay = -torch.rand(2, length, 1, generator=draw).double() / 50
    state = torch.randn(2, 4, 4, generator=draw).double()
    whole, last = delta_rule(query, key, value, decay, beta, state)
    first, middle = delta_rule(query[:, :301], key[:, :301], value[:, :301], decay[:, :301], beta[:, :301], state)
    second, end = delta_rule(query[:, 301:], key[:, 301:], value[:, 301:], decay[:, 301:], beta[:, 301:], middle)
    torch.testing.assert_close(whole, torch.cat([first, second], 1), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", [gated_delta, kda])
def test_a_decay_to_nothing_is_no_overflow(op):
    """exp of a large negative number is zero, and of its opposite infinity: only the former may ever be taken."""
    case = (KDA_CASES if op is kda else GATED_CASES)[0]
    arguments = case.arguments(1, 130, torch.float32)
    assert arguments["g"] is not None
    arguments["g"] = torch.where(arguments["g"] < -0.7, -300.0, 0.0)
    exact = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected, _ = recurrence(**exact)
    torch.testing.assert_close(invoke(op, arguments)[0].double(), expected, rtol=2e-5, atol=2e-5)
