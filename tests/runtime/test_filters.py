"""top-k, top-p and min-p against their definitions, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ad_core.runtime.filters import argmax, cutoff, draw, draw_filtered
from ad_core.runtime.noise import gumbel, position_keys, stream_key


def kept_by_definition(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Token ids that may be drawn. Equal logits stay or go together."""
    alive = set(range(len(logits)))
    if top_k:
        kth = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1]
        alive = {index for index in alive if logits[index] >= kth}
    highest = max(logits)
    if top_p < 1.0:
        total = math.fsum(math.exp(logits[index] - highest) for index in alive)
        mass, last = 0.0, highest
        for index in sorted(alive, key=lambda index: -logits[index]):
            if mass >= top_p:
                break
            mass, last = mass + math.exp(logits[index] - highest) / total, logits[index]
        alive = {index for index in alive if logits[index] >= last}
    if min_p:
        alive = {index for index in alive if logits[index] >= highest + math.log(min_p)}
    return alive


# Logits in steps of 1/4: ties are common, sums of their exponentials seldom lie on a boundary.
rows = st.lists(st.integers(-20, 20).map(lambda step: step / 4), min_size=8, max_size=40)


@settings(max_examples=80, deadline=None)
@given(
    rows, st.integers(0, 12), st.sampled_from([0.03, 0.31, 0.77, 0.953, 1.0]), st.sampled_from([0.0, 0.013, 0.21, 0.97]), st.integers(3, 7)
)
@example([4.75, 4.5, 4.5, 3.75, 3.0, 3.0, 0.0, 0.0], 5, 0.31, 0.0, 5)  # the second 3.0 ties with the fifth and counts
def test_what_is_kept_is_what_the_definition_keeps_and_a_narrow_look_agrees(logits, top_k, top_p, min_p, narrow):
    row = torch.tensor([logits])
    options = torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    total = row.logsumexp(1)
    values = row.sort(descending=True).values
    cut, _ = cutoff(values, total, *options)
    expected = kept_by_definition(logits, top_k, top_p, min_p)
    assert set((row[0] >= cut).nonzero()[:, 0].tolist()) == expected
    few, settled = cutoff(values[:, :narrow], total, *options)
    if settled:
        torch.testing.assert_close(few, cut)
        assert len(expected) < narrow


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(rows, st.integers(0, 12), st.sampled_from([0.31, 0.77, 1.0]), st.sampled_from([0.0, 0.21])), min_size=1, max_size=4)
)
def test_a_draw_is_the_largest_noisy_logit_of_what_is_kept_however_narrow_the_look(batch):
    width = max(len(row) for row, *_ in batch)
    logits = torch.tensor([[*row, *[-30.0] * (width - len(row))] for row, *_ in batch])
    top_k, top_p, min_p = (torch.tensor([entry[index] for entry in batch]) for index in (1, 2, 3))
    keys = position_keys([stream_key(3, row) for row in range(len(batch))], range(len(batch)), torch.device("cpu"))
    noisy = logits + gumbel(keys, torch.arange(width))
    expected = []
    for row, entry in enumerate(batch):
        kept = kept_by_definition(logits[row].tolist(), *entry[1:])
        expected.append(max(kept, key=lambda index: noisy[row, index].item()))
    for narrow in (2, 5, width):
        assert draw_filtered(logits, keys, top_k, top_p, min_p, narrow).tolist() == expected


def test_a_draw_without_filters_looks_at_every_token():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    keys = position_keys([stream_key(1, 0)] * 5, range(5), torch.device("cpu"))
    assert draw(logits, keys).tolist() == (logits + gumbel(keys, torch.arange(300))).argmax(1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_highest_logit_is_the_first_of_equals_and_a_nan_comes_before_all(dtype):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, float("nan"), 9.0, float("nan")], [float("-inf")] * 4], dtype=dtype)
    assert argmax(logits).tolist() == [1, 1, 0]
    wide = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert argmax(wide).tolist() == wide.argmax(1).tolist()
