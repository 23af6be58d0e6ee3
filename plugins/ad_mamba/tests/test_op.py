"""The canonical ops against the recurrence step by step, at lengths that end chunks and blocks anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ad_core.testing.calls import invoke
from ad_core.testing.cases import Case
from ad_mamba.op import scan, ssd
from ad_mamba.testing import SCAN_CASES, SSD_CASES

from .recurrence import scan_steps, ssd_steps

LENGTHS = (1, 7, 63, 100, 200)


def arguments(case: Case, length: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return case.arguments(2, length, dtype, seed=length)


def named(cases: list[Case]) -> dict[str, Any]:
    return {"argvalues": cases, "ids": [case.name for case in cases]}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", **named(SSD_CASES))
def test_ssd_is_its_recurrence(case: Case, length: int) -> None:
    given = arguments(case, length)
    torch.testing.assert_close(invoke(ssd.ssd, given)[0], ssd_steps(given)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", **named(SCAN_CASES))
def test_the_selective_scan_is_its_recurrence(case: Case, length: int) -> None:
    given = arguments(case, length)
    torch.testing.assert_close(invoke(scan.selective_scan, given)[0], scan_steps(given)[0], rtol=1e-9, atol=1e-9)


def test_the_state_goes_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "BLOCK", 64)
    monkeypatch.setattr(scan, "BLOCK", 32)
    one, two = arguments(SSD_CASES[0], 150), arguments(SCAN_CASES[0], 75)
    torch.testing.assert_close(invoke(ssd.ssd, one)[0], ssd_steps(one)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(invoke(scan.selective_scan, two)[0], scan_steps(two)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [5, 64, 130])
def test_ssd_continues_from_a_state(length: int) -> None:
    given = arguments(SSD_CASES[1], length)
    state = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, after = ssd.chunked(given["x"], given["dt"], given["A"], given["B"], given["C"], state)
    expected, last = ssd_steps(given, state)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [5, 16, 40])
def test_the_selective_scan_continues_from_a_state(length: int) -> None:
    given = arguments(SCAN_CASES[1], length)
    state = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, after = scan.chunked(given["u"], given["delta"], given["A"], given["B"], given["C"], state)
    expected, last = scan_steps(given, state)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [1e-4, 1.0, 300.0])
def test_decays_from_almost_none_to_total_stay_exact_in_float32(strength: float) -> None:
    """Products of decays underflow to zero and must never become a division by zero or an overflow."""
    one, two = arguments(SSD_CASES[0], 100, torch.float32), arguments(SCAN_CASES[0], 100, torch.float32)
    one["A"], two["A"] = -strength * torch.rand(4) - strength, -strength * torch.rand(12, 8) - strength
    for result, truth in ((invoke(ssd.ssd, one)[0], ssd_steps(one)[0]), (invoke(scan.selective_scan, two)[0], scan_steps(two)[0])):
        assert float((result - truth).abs().max() / truth.abs().max()) < 1e-5
