"""The torch kernels where the conformance kit's short sequences do not reach: many chunks, long contexts, slots side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ad_core.testing.cases import Case
from ad_core.testing.harness import Harness
from ad_mamba.mixer import SSD, SelectiveScan
from ad_mamba.testing import SCAN_CASES, SSD_CASES

from .recurrence import scan_steps, ssd_steps

MIXERS: dict[str, tuple[Any, Case, Any]] = {"ssd": (SSD, SSD_CASES[2], ssd_steps), "scan": (SelectiveScan, SCAN_CASES[0], scan_steps)}


def harness_of(kind: str, length: int, seed: int = 0) -> tuple[Harness, torch.Tensor]:
    mixer, case, steps = MIXERS[kind]
    harness = Harness(mixer(), mixer.kernels[0], case, sequences=3, length=length, seed=seed)
    return harness, steps(harness.data)[0]


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("first", [1, 7, 63, 64, 100])
def test_a_chunk_continues_a_state_at_any_length(kind: str, first: int) -> None:
    harness, expected = harness_of(kind, 150)
    done = 0
    for work in ([(0, first)], [(0, 150 - first - 2), (1, 70)], [(0, 1), (1, 1), (2, 5)], [(0, 1), (1, 79), (2, 100)]):
        outputs = harness.step(work)
        for index, count in work:
            stop = harness.sequences[index].context
            difference = (outputs[index][0].double() - expected[index, stop - count : stop]).abs().max()
            assert float(difference) < 3e-5 * float(expected.abs().max())
            done += count
    assert done == 150 + 150 + 105


@pytest.mark.parametrize("kind", MIXERS)
def test_decodes_in_consecutive_slots_and_in_others_agree(kind: str) -> None:
    """Consecutive slots are updated where they lie, others are gathered and put back."""
    results = []
    for order in ([1, 2, 3], [3, 1, 2]):
        harness, _ = harness_of(kind, 12)
        for sequence, slot in zip(harness.sequences, order, strict=True):
            sequence.slot = slot
        harness.step([(0, 5), (1, 3), (2, 8)])
        outputs = harness.step([(0, 1), (1, 1), (2, 1)])
        states = harness.pools["ssm_state"][torch.tensor(order)]
        results.append((torch.stack([outputs[index][0] for index in range(3)]), states))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
