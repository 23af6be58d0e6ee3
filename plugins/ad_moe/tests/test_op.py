"""The canonical op and the torch kernel against the step-by-step oracle."""

from __future__ import annotations

import itertools

import pytest
import torch

from ad_core.testing import Case
from ad_core.testing.calls import invoke
from ad_core.testing.cases import in_float64
from ad_moe import plugin
from ad_moe.gating import ACTIVATIONS, Gating
from ad_moe.testing import CASES, LINEAR_CASES, case

from .oracle import experts

EXPERTS, LINEAR = plugin.ad_ops()
KERNEL = torch.ops.ad_moe.moe_torch.default
EVERY_GATE = [case(f"act_{name}", activation=name, layout=layout) for name in ACTIVATIONS for layout in ("none", "concatenated")]


def named(cases: list[Case]) -> dict[str, object]:
    return {"argvalues": cases, "ids": [each.name for each in cases]}


@pytest.mark.parametrize("each", **named([*CASES, *EVERY_GATE]))
@pytest.mark.parametrize("op", [EXPERTS.op, KERNEL], ids=["canonical", "kernel"])
def test_float64_is_what_the_oracle_computes_choice_by_choice(op, each):
    arguments = in_float64(each.arguments(2, 7, torch.float32))
    (result,) = invoke(op, arguments)
    torch.testing.assert_close(result, experts(arguments), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize("op", [EXPERTS.op, KERNEL], ids=["canonical", "kernel"])
def test_odd_lengths(op, length, dtype):
    arguments = CASES[3].arguments(1, length, dtype)
    (result,) = invoke(op, arguments)
    wanted = experts(arguments)
    assert result.dtype == dtype
    assert float((result.double() - wanted).abs().max() / wanted.abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_choice_outside_of_the_experts_counts_nothing():
    arguments = CASES[0].arguments(1, 5, torch.float32)
    (whole,) = invoke(KERNEL, arguments)
    half = {**arguments, "up": arguments["up"][:3], "down": arguments["down"][:3]}
    rest = {**arguments, "up": arguments["up"][3:], "down": arguments["down"][3:], "selected": arguments["selected"] - 3}
    torch.testing.assert_close(invoke(KERNEL, half)[0] + invoke(KERNEL, rest)[0], whole)


def test_nothing_chosen_is_zero():
    arguments = CASES[0].arguments(1, 4, torch.float32)
    arguments["selected"] = torch.full_like(arguments["selected"], 99)
    for op in (EXPERTS.op, KERNEL):
        assert not invoke(op, arguments)[0].any()


def test_weights_of_another_dtype_are_not_rounded_to_that_of_the_tokens():
    arguments = CASES[0].arguments(1, 6, torch.bfloat16)
    arguments["weights"] = arguments["weights"].float() * 1.0009765625
    for op in (EXPERTS.op, KERNEL):
        (result,) = invoke(op, arguments)
        (exact,) = invoke(EXPERTS.op, in_float64(arguments))
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), exact, rtol=2e-2, atol=2e-2)


def test_an_activation_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="swoosh"):
        Gating("swoosh")(torch.zeros(1, 4))


@pytest.mark.parametrize("each", **named(LINEAR_CASES))
@pytest.mark.parametrize("op", [LINEAR.op, torch.ops.ad_moe.routed_linear_torch.default], ids=["canonical", "kernel"])
def test_a_routed_linear_is_each_choice_times_its_experts_weight(op, each):
    arguments = in_float64(each.arguments(2, 7, torch.float32))
    tokens, selected, weight = (arguments[name] for name in ("tokens", "selected", "weight"))
    (result,) = invoke(op, arguments)
    for b, s, k in itertools.product(*map(range, selected.shape)):
        token, expert = tokens[b, s, k] if tokens.dim() == 4 else tokens[b, s], int(selected[b, s, k])
        wanted = weight[expert] @ token if expert < len(weight) else torch.zeros(weight.shape[1], dtype=torch.float64)
        torch.testing.assert_close(result[b, s, k], wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("each", **named([CASES[0], CASES[7], CASES[6]]))
def test_ranks_that_divide_the_experts_add_up(each):
    """As the shard rule says: what it names is cut, the choices count from the rank's first expert, the results are summed."""
    arguments = each.arguments(2, 9, torch.float32)
    (rule,), total = EXPERTS.shard_rules(), 0
    assert rule.output == "sum"
    whole, edges = arguments["up"].shape[0], (0, 2, arguments["up"].shape[0])
    for first, stop in itertools.pairwise(edges):
        cut = {
            name: value.narrow(rule.splits[name], first, stop - first) if name in rule.splits and isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        total = total + invoke(KERNEL, {**cut, "selected": arguments["selected"] - first})[0]
    assert whole > 2
    torch.testing.assert_close(total, invoke(KERNEL, arguments)[0], rtol=1e-5, atol=1e-5)
