"""The plan over slots, against steps that are spelled out and states that are moved on one by one."""

from __future__ import annotations

import pytest
import torch

from ad_core.api.types import Limits
from ad_core.cache.batch import BatchBuilder, GroupView, Row
from ad_core.kernels import slots as plans
from ad_core.kernels.slots import NONE, Chunk, Step

LIMITS = Limits(max_tokens=64, max_sequences=6, max_model_len=32, page_size=4)
BUILDER = BatchBuilder(LIMITS, 0, torch.device("cpu"))
SLOTS = 9

# Sequences as (tokens, context, slot), decodes first, and what the step is.
STEPS = {
    "one decode": ([(1, 5, 4)], Step(1, 1, 0, False, 4), []),
    "decodes side by side": ([(1, 5, 2), (1, 9, 3), (1, 1, 4)], Step(3, 3, 0, False, 2), []),
    "decodes apart": ([(1, 5, 2), (1, 9, 4)], Step(2, 2, 0, False, NONE), []),
    "decodes in another order": ([(1, 5, 3), (1, 9, 2)], Step(2, 2, 0, False, NONE), []),
    "a decode that starts": ([(1, 5, 2), (1, 0, 3)], Step(2, 2, 0, True, 2), []),
    "prompts alone": ([(4, 0, 7), (3, 8, 1)], Step(7, 0, 2, False, NONE), [Chunk(0, 4, 7, True), Chunk(4, 3, 1, False)]),
    "all of it": ([(1, 0, 5), (1, 3, 8), (6, 0, 6), (2, 2, 1)], Step(10, 2, 2, True, NONE), [Chunk(2, 6, 6, True), Chunk(8, 2, 1, False)]),
}
DECODES = [name for name, (_, step, _) in STEPS.items() if step.decodes]


def planned(name: str, out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`out` after the step of that name."""
    rows = [Row([0] * tokens, context, lane, slot=slot) for lane, (tokens, context, slot) in enumerate(STEPS[name][0], 1)]
    plans.plan_step(GroupView(BUILDER.build(rows), 0), out)
    return out


def buffers(**options: bool) -> dict[str, torch.Tensor]:
    """As they are allocated: with whatever was there."""
    specs = plans.plan_buffers(LIMITS, **options)
    return {name: torch.full(spec.shape, 77).to(spec.dtype) for name, spec in specs.items()}


@pytest.mark.parametrize("host_only", [False, True])
def test_a_step_is_read_as_it_was_whatever_came_before_it(host_only):
    out = buffers(host_only=host_only)
    assert set(out) == ({"plan", "records"} if host_only else {"plan", "records", "slots", "stale"})
    for name in (*STEPS, *reversed(STEPS)):
        planned(name, out)
        assert plans.read_plan(out["plan"], out["records"]) == STEPS[name][1:], name


def test_a_step_of_as_many_sequences_as_there_may_be_fits():
    out = buffers()
    plans.plan_step(GroupView(BUILDER.build([Row([0], 3, lane, slot=8 - lane) for lane in range(1, 7)]), 0), out)
    assert plans.read_plan(out["plan"], out["records"]) == (Step(6, 6, 0, False, NONE), [])
    assert out["slots"].tolist() == [7, 6, 5, 4, 3, 2]


def moved(pool: torch.Tensor, name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One by one: the pool after every decode has doubled its state and added its row number and one, and those states."""
    pool, states = pool.clone(), []
    for row, (_, context, slot) in enumerate(STEPS[name][0][: STEPS[name][1].decodes]):
        pool[slot] = (2 * pool[slot] if context else torch.zeros_like(pool[slot])) + row + 1
        states.append(pool[slot].clone())
    return pool, states


def pool_for(name: str) -> torch.Tensor:
    """States of [2, 3]; those of sequences that start hold NaN."""
    pool = torch.randn(SLOTS, 2, 3, generator=torch.Generator().manual_seed(3))
    for _, context, slot in STEPS[name][0]:
        if not context:
            pool[slot] = torch.nan
    return pool


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("in_place", [True, False])
def test_states_are_taken_and_put_back_and_no_others_change(name, in_place):
    out, pool = planned(name, buffers()), pool_for(name)
    expected, states = moved(pool, name)
    step, _ = plans.read_plan(out["plan"], out["records"])
    chosen = plans.take_states(pool, step, out["slots"], out["stale"])
    added = torch.arange(1.0, step.decodes + 1)[:, None, None]
    if in_place:
        chosen.mul_(2).add_(added)
        plans.put_states(pool, chosen, step, out["slots"])
        torch.testing.assert_close(chosen, torch.stack(states))
    else:
        plans.put_states(pool, chosen, step, out["slots"], chosen * 2 + added)
    torch.testing.assert_close(pool, expected, equal_nan=True)


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("large", [False, True])
def test_decodes_move_on_together_or_one_by_one(name, large, monkeypatch):
    out, pool = planned(name, buffers()), pool_for(name)
    expected, _ = moved(pool, name)
    step, _ = plans.read_plan(out["plan"], out["records"])
    monkeypatch.setattr(plans, "LARGE", 1 if large else pool[0].nbytes + 1)
    seen = []
    for rows, now in plans.decoding_states(pool, step, out["records"], out["slots"], out["stale"]):
        assert len(now) == rows.stop - rows.start
        now.mul_(2).add_(torch.arange(rows.start + 1.0, rows.stop + 1)[:, None, None])
        seen.append(rows)
    assert len(seen) == (step.decodes if large else 1)
    torch.testing.assert_close(pool, expected, equal_nan=True)


def test_states_side_by_side_are_changed_where_they_lie():
    out, pool = planned("decodes side by side", buffers()), pool_for("decodes side by side")
    step, _ = plans.read_plan(out["plan"], out["records"])
    assert plans.take_states(pool, step, out["slots"], out["stale"]).data_ptr() == pool[2].data_ptr()
