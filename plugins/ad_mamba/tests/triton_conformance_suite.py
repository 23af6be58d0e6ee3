"""The Triton kernels against the core's conformance kit, in Triton's interpreter. Run by test_triton_interpreter.py, not collected."""

import os

import pytest

from ad_core.testing import MixerConformance

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: run test_triton_interpreter.py", allow_module_level=True)


class TestScan(MixerConformance):
    mixer = "ad_mamba.mixer:SelectiveScan"
    cases = "ad_mamba.testing:SCAN_CASES"
    kernels = ("mamba.scan.triton",)
    min_checks = 36


class TestSSD(MixerConformance):
    mixer = "ad_mamba.mixer:SSD"
    cases = "ad_mamba.testing:SSD_CASES"
    kernels = ("mamba.ssd.triton",)
    min_checks = 54
