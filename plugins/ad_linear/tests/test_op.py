"""The canonical ops against the recurrences written out step by step in float64."""

from __future__ import annotations

import pytest
import torch

from ad_core.testing.calls import invoke
from ad_linear.lightning import CHUNK, decayed_attention, lightning
from ad_linear.mlstm import matrix_memory, mlstm
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


def test_two_calls_that_are_cut_anywhere_give_what_one_gives():
    """States and all, from a state that is not zero."""
    draw = torch.Generator().manual_seed(0)
    length, cut = 2 * CHUNK + 7, CHUNK + 9

    def normal(*shape):
        return torch.randn(2, 3, *shape, generator=draw, dtype=torch.float64)

    tokens = normal(length, 4), normal(length, 4), normal(length, 5)
    gates = normal(length), torch.nn.functional.logsigmoid(2 + normal(length))
    decay, state, memory, peak = -torch.rand(3, generator=draw).double() / 9, normal(4, 5), normal(4, 6), normal()
    runs = [
        lambda part, state: decayed_attention(*(x[:, :, part] for x in tokens), decay, state),
        lambda part, state: matrix_memory(*(x[:, :, part] for x in (*tokens, *gates)), *state, 1e-6),
    ]
    for run, start in zip(runs, (state, (memory, peak)), strict=True):
        whole, *last = run(slice(0, length), start)
        first, *middle = run(slice(0, cut), start)
        second, *end = run(slice(cut, length), middle[0] if len(middle) == 1 else middle)
        torch.testing.assert_close(whole, torch.cat([first, second], 2), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-11)
