"""The Triton kernel in Triton's interpreter: the conformance kit, and the step-by-step oracle. Run by test_triton_interpreter.py."""

import os

import pytest
import torch

from ad_core.testing import OpConformance
from ad_core.testing.calls import invoke

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)

from ad_moe import plugin
from ad_moe.gating import ACTIVATIONS
from ad_moe.kernels import triton_launch
from ad_moe.testing import CASES, LINEAR_CASES, case

from .oracle import experts

OP = plugin.ad_ops()[0].kernels[1]
EVERY_GATE = [case(f"act_{name}", activation=name, layout=layout) for name in ACTIVATIONS for layout in ("none", "concatenated")]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class TestTriton(OpConformance):
    op = "ad_moe.moe:Experts"
    cases = "ad_moe.testing:CASES"
    kernels = ("moe.triton",)
    min_checks = 230


class TestTritonLinear(OpConformance):
    op = "ad_moe.moe:RoutedLinear"
    cases = "ad_moe.testing:LINEAR_CASES"
    kernels = ("moe.linear.triton",)
    min_checks = 34


@pytest.mark.parametrize("each", LINEAR_CASES, ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_projection_is_each_choices_token_times_its_weight(dtype, each):
    """One choice at a time; more tokens than a block has, and experts that are chosen by nobody."""
    arguments = each.arguments(1, 90, dtype)
    (result,) = invoke(torch.ops.ad_moe.routed_linear_triton.default, arguments)
    tokens, weight = arguments["tokens"].double(), arguments["weight"].double()
    for place, choices in enumerate(arguments["selected"][0].tolist()):
        for choice, expert in enumerate(choices):
            token = tokens[0, place, choice] if tokens.dim() == 4 else tokens[0, place]
            wanted = weight[expert] @ token if expert < len(weight) else torch.zeros(12, dtype=torch.float64)
            assert float((result[0, place, choice].double() - wanted).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("each", [each for each in (*CASES, *EVERY_GATE) if each.name != "normed"], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_gate_and_layout_is_what_the_oracle_computes(dtype, each):
    arguments = each.arguments(1, 7, dtype)
    (result,) = invoke(torch.ops.ad_moe.moe_triton.default, arguments)
    wanted = experts(arguments)
    assert float((result.double() - wanted).abs().max()) <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("length", [1, 7, 63, 100])
def test_odd_lengths(length):
    """Blocks that are full, blocks that are not, and experts that nobody chose."""
    arguments = case("wide", experts=40, choices=6, inner=40, output=72).arguments(1, length, torch.float32)
    (result,) = invoke(torch.ops.ad_moe.moe_triton.default, arguments)
    torch.testing.assert_close(result.double(), experts(arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("number", "block"), [(1, 16), (7, 4), (64, 16), (300, 32)])
def test_the_schedule_has_every_choice_of_an_expert_once(number, block):
    generator = torch.Generator().manual_seed(number)
    selected = torch.randint(-1, 8, (1, number, 3), generator=generator)  # 6 experts: -1, 6 and 7 are nobody's
    order, blocks = triton_launch.schedule(selected, 6, block)
    flat, seen = selected.flatten().tolist(), []
    for expert, first, stop in blocks.tolist():
        if expert >= 0:
            chosen = order[first : min(first + block, stop)].tolist()
            assert chosen
            assert {flat[place] for place in chosen} == {expert}
            seen += chosen
    assert sorted(seen) == [place for place, expert in enumerate(flat) if 0 <= expert < 6]
