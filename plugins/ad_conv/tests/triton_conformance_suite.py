"""The Triton kernels against the core's conformance kit, in Triton's interpreter. Run by test_triton_interpreter.py, not collected."""

import os

import pytest

from ad_core.testing import MixerConformance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)


class TestTriton(MixerConformance):
    mixer = "ad_conv.mixer:CausalConv1d"
    cases = "ad_conv.testing:CASES"
    kernels = ("conv.causal.triton",)
    min_checks = 100
