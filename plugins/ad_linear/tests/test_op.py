"""The canonical ops against the recurrences written out step by step in float64."""

from __future__ import annotations

import pytest
import torch

from ad_core.testing.calls import invoke
from ad_linear.lightning import CHUNK, lightning
from ad_linear.mlstm import mlstm
from ad_linear.testing import LIGHTNING_CASES, MLSTM_CASES

from . import oracle

LENGTHS = [1, 7, 63, CHUNK, CHUNK + 1, 100, 3 * CHUNK]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", LIGHTNING_CASES, ids=lambda case: case.name)
def test_lightning_is_the_recurrence(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    torch.testing.assert_close(invoke(lightning, arguments)[0], oracle.lightning(**arguments)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", MLSTM_CASES, ids=lambda case: case.name)
def test_mlstm_is_the_recurrence(case, length):
    arguments = case.arguments(2, length, torch.float64, seed=length)
    torch.testing.assert_close(invoke(mlstm, arguments)[0], oracle.mlstm(**arguments), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("op", "cases", "truth"), [(lightning, LIGHTNING_CASES, lambda **a: oracle.lightning(**a)[0]), (mlstm, MLSTM_CASES, oracle.mlstm)]
)
def test_float32_stays_close_over_many_chunks(op, cases, truth):
    for case in cases:
        arguments = case.arguments(1, 300, torch.float32)
        expected = truth(**{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})
        assert (invoke(op, arguments)[0].double() - expected).abs().max() < 1e-5 * expected.abs().max(), case.name


def test_gates_of_any_size_are_no_overflow():
    """exp(input gate) alone would be infinite, and so would the ratio of two chunks."""
    arguments = MLSTM_CASES[0].arguments(1, 150, torch.float32)
    arguments["input_gate"] = arguments["input_gate"] * 60
    arguments["forget_gate"] = arguments["forget_gate"] * 20
    expected = oracle.mlstm(**{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})
    result = invoke(mlstm, arguments)[0]
    assert result.isfinite().all()
    assert (result.double() - expected).abs().max() < 1e-4 * expected.abs().max()
