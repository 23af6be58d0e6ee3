"""The plugin against the core's conformance kit: a few cases always, all of them in the long run."""

import pytest

from ad_core.kernels import slots
from ad_core.testing import MixerConformance


class TestGatedDelta(MixerConformance):
    mixer = "ad_deltanet.mixer:GatedDelta"
    cases = "ad_deltanet.testing:QUICK_GATED_CASES"
    kernels = ("deltanet.gated_delta.torch",)
    min_checks = 36


class TestKda(MixerConformance):
    mixer = "ad_deltanet.mixer:KimiDelta"
    cases = "ad_deltanet.testing:QUICK_KDA_CASES"
    kernels = ("deltanet.kda.torch",)
    min_checks = 18


class TestLarge(TestGatedDelta):
    """Decodes that are moved on one by one."""

    @pytest.fixture(autouse=True)
    def _every_state_is_large(self, monkeypatch):
        monkeypatch.setattr(slots, "LARGE", 1)


@pytest.mark.slow
class TestEveryGatedDelta(TestGatedDelta):
    cases = "ad_deltanet.testing:GATED_CASES"
    min_checks = 150


@pytest.mark.slow
class TestEveryKda(TestKda):
    cases = "ad_deltanet.testing:KDA_CASES"
    min_checks = 100
