"""The plugin against the core's conformance kit: a few cases always, all of them in the long run."""

import pytest

from ad_core.kernels import slots
from ad_core.testing import MixerConformance
from ad_linear.testing import LIGHTNING_CASES, MLSTM_CASES


class TestLightning(MixerConformance):
    mixer = "ad_linear.mixer:Lightning"
    cases = LIGHTNING_CASES[:1]
    kernels = ("linear.lightning.torch",)
    min_checks = 18


class TestMLstm(MixerConformance):
    mixer = "ad_linear.mixer:MLstm"
    cases = MLSTM_CASES[:1]
    kernels = ("linear.mlstm.torch",)
    min_checks = 18


class TestLarge(TestMLstm):
    """Decodes that are moved on one by one."""

    @pytest.fixture(autouse=True)
    def _every_state_is_large(self, monkeypatch):
        monkeypatch.setattr(slots, "LARGE", 1)


@pytest.mark.slow
class TestEveryLightning(TestLightning):
    cases = LIGHTNING_CASES
    min_checks = 54


@pytest.mark.slow
class TestEveryMLstm(TestMLstm):
    cases = MLSTM_CASES
    min_checks = 54
