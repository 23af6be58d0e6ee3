"""The Triton kernels against the core's conformance kit, in Triton's interpreter. Run by test_triton_interpreter.py, not collected."""

import os

import pytest

from ad_core.testing import MixerConformance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)


class TestLightning(MixerConformance):
    mixer = "ad_linear.mixer:Lightning"
    cases = "ad_linear.testing:LIGHTNING_CASES"
    kernels = ("linear.lightning.triton",)
    min_checks = 54


class TestMLstm(MixerConformance):
    mixer = "ad_linear.mixer:MLstm"
    cases = "ad_linear.testing:MLSTM_CASES"
    kernels = ("linear.mlstm.triton",)
    min_checks = 54
