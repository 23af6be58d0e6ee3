"""The plugin against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestTorch(MixerConformance):
    mixer = "ad_attention.mixer:Attention"
    cases = "ad_attention.testing:CASES"
    kernels = ("attention.softmax.torch",)
    min_checks = 290


class TestNative(MixerConformance):
    mixer = "ad_attention.mixer:Attention"
    cases = "ad_attention.testing:CASES"
    kernels = ("attention.softmax.native",)
    min_checks = 290
