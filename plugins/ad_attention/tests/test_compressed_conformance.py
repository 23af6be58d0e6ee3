"""Compressed attention against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestCompress(MixerConformance):
    mixer = "ad_attention.compressed.mixer:Compress"
    cases = "ad_attention.compressed.testing:COMPRESS_CASES"
    min_checks = 100


class TestCompressed(MixerConformance):
    mixer = "ad_attention.compressed.mixer:Compressed"
    cases = "ad_attention.compressed.testing:COMPRESSED_CASES"
    min_checks = 80
