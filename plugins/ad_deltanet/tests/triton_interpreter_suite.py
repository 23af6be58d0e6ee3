"""The Triton kernels over many chunks, against the recurrence in float64. Run by test_triton_interpreter.py, not collected."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)

from ad_deltanet.kernels.triton_launch import CHUNK, delta_rule
from ad_deltanet.testing import GATED_CASES, KDA_CASES

from .oracle import recurrence

CASES = {f"{kind}-{case.name}": case for kind, cases in (("gated", GATED_CASES), ("kda", KDA_CASES)) for case in cases}
SENTINEL = 7.0


@pytest.mark.parametrize("name", CASES)
def test_ragged_sequences_go_on_from_their_states(name):
    """Lengths at and around whole chunks; one sequence starts here, one is padding, and rows are left over."""
    lengths, fresh, slots = [1, CHUNK, 2 * CHUNK + 3, 1, 7, 0], [False, False, True, True, False, False], [4, 2, 5, 1, 6, 0]
    total = sum(lengths)
    arguments = CASES[name].arguments(1, total + 3, torch.float32)
    heads, width, dim = *arguments["value"].shape[2:], arguments["key"].shape[3]
    draw = torch.Generator().manual_seed(1)
    state = torch.randn(8, heads, dim, width, generator=draw)
    before = state.clone()
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    for slot, new in zip(slots, fresh, strict=True):
        if new:
            state[slot] = torch.nan
    output = delta_rule(**arguments, state=state, cu_seqlens=bounds, state_slots=torch.tensor(slots).int(), fresh=torch.tensor(fresh))
    assert not output[:, total:].any()
    assert torch.equal(state[[0, 3, 7]], before[[0, 3, 7]]), "slots that are not the step's"
    for row, length in enumerate(lengths):
        if not length:
            continue
        part = slice(int(bounds[row]), int(bounds[row + 1]))
        own = {key: x[:, part].double() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        start = None if fresh[row] else before[slots[row], None].double()
        expected, after = recurrence(**own, state=start)
        size = max(1.0, float(expected.abs().max()))
        assert (output[:, part].double() - expected).abs().max() < 1e-5 * size
        assert (state[slots[row]].double() - after[0]).abs().max() < 1e-5 * max(1.0, float(after.abs().max()))


def test_a_decay_to_nothing_is_no_overflow():
    for case in (GATED_CASES[0], KDA_CASES[0]):
        arguments = case.arguments(1, 40, torch.float32)
        arguments["g"] = torch.where(arguments["g"] < -0.7, -300.0, 0.0)
        own = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
        heads, width, dim = *arguments["value"].shape[2:], arguments["key"].shape[3]
        fields = {"cu_seqlens": torch.tensor([0, 40]).int(), "state_slots": torch.tensor([1]).int(), "fresh": torch.tensor([True])}
        output = delta_rule(**arguments, state=torch.zeros(2, heads, dim, width), **fields)
        torch.testing.assert_close(output.double(), recurrence(**own)[0], rtol=2e-5, atol=2e-5)
