"""The plugin against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestSelectiveScan(MixerConformance):
    mixer = "ad_mamba.mixer:SelectiveScan"
    cases = "ad_mamba.testing:SCAN_CASES"
    kernels = ("mamba.scan.torch",)
    min_checks = 36


class TestSSD(MixerConformance):
    mixer = "ad_mamba.mixer:SSD"
    cases = "ad_mamba.testing:SSD_CASES"
    kernels = ("mamba.ssd.torch", "mamba.ssd.native")
    min_checks = 96
