"""The Triton kernels against the core's conformance kit, in Triton's interpreter. Run by test_triton_interpreter.py, not collected."""

import os

import pytest

from ad_core.testing import MixerConformance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)


class TestRgLru(MixerConformance):
    mixer = "ad_rnn.mixer:RgLru"
    cases = "ad_rnn.testing:RG_LRU_CASES"
    kernels = ("rnn.rg_lru.triton",)
    min_checks = 36


class TestWkv4(MixerConformance):
    mixer = "ad_rnn.mixer:Wkv4"
    cases = "ad_rnn.testing:WKV4_CASES"
    kernels = ("rnn.wkv4.triton",)
    min_checks = 36


class TestTokenShift(MixerConformance):
    mixer = "ad_rnn.mixer:TokenShift"
    cases = "ad_rnn.testing:TOKEN_SHIFT_CASES"
    kernels = ("rnn.token_shift.triton",)
    min_checks = 18
