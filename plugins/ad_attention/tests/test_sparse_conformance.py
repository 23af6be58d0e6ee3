"""Sparse attention against the core's conformance kit."""

from ad_core.testing import MixerConformance


class TestSelect(MixerConformance):
    mixer = "ad_attention.sparse.mixer:Select"
    cases = "ad_attention.sparse.testing:SELECT_CASES"
    kernels = ("attention.select.torch",)
    min_checks = 30


class TestSelected(MixerConformance):
    mixer = "ad_attention.sparse.mixer:Selected"
    cases = "ad_attention.sparse.testing:SELECTED_CASES"
    kernels = ("attention.selected.torch",)
    min_checks = 45
