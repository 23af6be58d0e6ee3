"""Masks are told apart by their values alone: templates of every kind and size, and their near misses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ad_attention.match.evaluate import Unknown
from ad_attention.match.mask_classifier import MaskKind, read_mask

EPS = torch.finfo(torch.float32).eps
LENGTH = 40
ROW, COLUMN = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
CAUSAL = COLUMN <= ROW
HIDDEN = st.sampled_from([float("-inf"), torch.finfo(torch.float32).min, -1e4, -1e9])


def matrix(seen: torch.Tensor, hidden: float = float("-inf"), bias: torch.Tensor | None = None) -> torch.Tensor:
    """[H, S, S]"""
    values = torch.zeros(1, LENGTH, LENGTH) if bias is None else bias
    return values.masked_fill(~seen, hidden)


@settings(deadline=None)
@given(size=st.integers(1, LENGTH - 1), hidden=HIDDEN)
def test_windows(size, hidden):
    kind = read_mask(matrix(CAUSAL & (size > ROW - COLUMN), hidden), EPS)
    assert (kind.window, kind.chunk, kind.slopes) == (size, None, None)


@settings(deadline=None)
@given(size=st.integers(2, LENGTH - 1), hidden=HIDDEN)
def test_chunks(size, hidden):
    kind = read_mask(matrix(CAUSAL & (ROW - ROW % size <= COLUMN), hidden), EPS)
    assert (kind.window, kind.chunk, kind.slopes) == (None, size, None)


@settings(deadline=None)
@given(
    slopes=st.lists(st.floats(2**-8, 1.0, width=32), min_size=1, max_size=5),
    window=st.none() | st.integers(2, LENGTH - 1),
    row=st.sampled_from(["distance", "key", "distance to the end"]),
)
def test_slopes_whatever_constant_each_row_adds(slopes, window, row):
    slope = torch.tensor(slopes)[:, None, None]
    bias = {
        "distance": slope * (COLUMN - ROW),
        "key": (slope * COLUMN).expand(-1, LENGTH, -1),
        "distance to the end": (slope * (COLUMN - 39)).expand(-1, LENGTH, -1),
    }
    seen = CAUSAL if window is None else CAUSAL & (window > ROW - COLUMN)
    kind = read_mask(matrix(seen, bias=bias[row]), EPS)
    assert (kind.window, kind.chunk) == (window, None)
    assert torch.allclose(kind.slopes, torch.tensor(slopes), rtol=1e-5)


@settings(deadline=None)
@given(
    query=st.integers(0, LENGTH - 1),
    key=st.integers(0, LENGTH - 1),
    base=st.sampled_from([MaskKind(), MaskKind(window=5), MaskKind(chunk=5)]),
)
def test_one_wrong_entry_is_seen(query, key, base):
    seen = base.allowed(LENGTH)
    seen[query, key] = ~seen[query, key]
    try:
        kind = read_mask(matrix(seen), EPS)
    except Unknown:
        return
    assert torch.equal(kind.allowed(LENGTH), seen)  # such as the last query of a window one key wider


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (
            matrix(CAUSAL).repeat(2, 1, 1).index_put((torch.tensor(1), torch.tensor(9), torch.tensor(0)), torch.tensor(-1e9)),
            "differs between heads",
        ),
        (matrix(CAUSAL, bias=-0.1 * (ROW - COLUMN).float().sqrt()[None].nan_to_num()), "not a slope"),
        (matrix(CAUSAL, bias=torch.where(ROW - COLUMN > 30, -0.01, 0.0)[None]), "not a slope"),
        (matrix(CAUSAL, -5.0), "sees keys after it"),
        (matrix(CAUSAL & (ROW != COLUMN)), "its own key|sees keys after"),
    ],
)
def test_near_misses_say_what_they_miss(values, why):
    with pytest.raises(Unknown, match=why):
        read_mask(values, EPS)
