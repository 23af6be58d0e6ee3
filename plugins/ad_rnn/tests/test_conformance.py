"""The plugin against the core's conformance kit."""

import pytest

from ad_core.testing import MixerConformance
from ad_rnn.testing import RG_LRU_CASES, WKV4_CASES


class TestRgLru(MixerConformance):
    mixer = "ad_rnn.mixer:RgLru"
    cases = RG_LRU_CASES[:1]
    kernels = ("rnn.rg_lru.torch",)
    min_checks = 18


class TestWkv4(MixerConformance):
    mixer = "ad_rnn.mixer:Wkv4"
    cases = WKV4_CASES[:1]
    kernels = ("rnn.wkv4.torch",)
    min_checks = 18


class TestTokenShift(MixerConformance):
    mixer = "ad_rnn.mixer:TokenShift"
    cases = "ad_rnn.testing:TOKEN_SHIFT_CASES"
    kernels = ("rnn.token_shift.torch",)
    min_checks = 18


@pytest.mark.slow
class TestEveryRgLru(TestRgLru):
    cases = RG_LRU_CASES
    min_checks = 36


@pytest.mark.slow
class TestEveryWkv4(TestWkv4):
    cases = WKV4_CASES
    min_checks = 36
