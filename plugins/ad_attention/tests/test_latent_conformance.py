"""Latent attention against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestTorch(MixerConformance):
    mixer = "ad_attention.latent.mixer:LatentAttention"
    cases = "ad_attention.latent.testing:CASES"
    kernels = ("attention.mla.torch",)
    min_checks = 140
