"""The plugin against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestTorch(MixerConformance):
    mixer = "ad_conv.mixer:CausalConv1d"
    cases = "ad_conv.testing:CASES"
    kernels = ("conv.causal.torch", "conv.causal.native")
    min_checks = 190
