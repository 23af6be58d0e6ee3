"""The Triton kernels against the core's conformance kit, in Triton's interpreter. Run by test_triton_interpreter.py, not collected."""

import os

import pytest

from ad_core.testing import MixerConformance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)


class TestGatedDelta(MixerConformance):
    mixer = "ad_deltanet.mixer:GatedDelta"
    cases = "ad_deltanet.testing:GATED_CASES"
    kernels = ("deltanet.gated_delta.triton",)
    min_checks = 140


class TestKda(MixerConformance):
    mixer = "ad_deltanet.mixer:KimiDelta"
    cases = "ad_deltanet.testing:KDA_CASES"
    kernels = ("deltanet.kda.triton",)
    min_checks = 90
