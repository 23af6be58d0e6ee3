"""The kit on two toy mixers, one for each kind of memory: it must pass what is right, and notice what is missing."""

import pytest

from ad_core.testing import Case, MixerConformance, Report, conformance, run_checks
from ad_core.testing.conformance import absence
from ad_core.testing.toys import EMA_CASES, RECALL_CASES, Ema, EmaSlots, Recall, RecallPaged

pytest_plugins = ("pytester",)


class TestEma(MixerConformance):
    mixer = "ad_core.testing.toys:Ema"
    cases = "ad_core.testing.toys:EMA_CASES"
    min_checks = 18


class TestRecall(MixerConformance):
    mixer = Recall
    cases = RECALL_CASES
    min_checks = 37


def test_every_check_is_a_test_method_and_is_in_run_checks():
    methods = {name.removeprefix("test_") for name in vars(MixerConformance) if name.startswith("test_")}
    plain = {f"op_{name}" for name in conformance.OP_CHECKS} | set(conformance.kernel_checks.KERNEL_CHECKS)
    assert methods == plain | {"enough_checks_exist"}


def test_run_checks_counts_what_it_ran():
    report = run_checks(Ema(), EMA_CASES)
    assert not report.failed
    assert len(report.passed) == 18  # 4 of the op, 14 of the kernel: nothing has a window


def test_a_check_that_compares_nothing_fails():
    report = Report()
    conformance._record(report, "empty[x]", lambda subject: None, conformance.Subject(Ema(), EMA_CASES[0]))
    assert "compared nothing" in report.failed["empty[x]"]


def test_fewer_checks_than_promised_is_a_failure(pytester_class):
    result = pytester_class("min_checks = 500")
    result.assert_outcomes(passed=18, failed=1, skipped=2)  # nothing has a window, and nothing is without memory
    result.stdout.fnmatch_lines(["*18 checks were generated, 500 are promised*"])


def test_a_kernel_that_does_not_exist_is_named(pytester_class):
    result = pytester_class('kernels = ("toy.ema.fast",)')
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*toy.ema has no kernel 'toy.ema.fast'*"])


@pytest.fixture
def pytester_class(pytester):
    """Runs pytest on a subclass of the kit for the toy recurrence, with one more class attribute."""

    def run(attribute: str):
        pytester.makepyfile(
            f"""
            from ad_core.testing import MixerConformance

            class TestIt(MixerConformance):
                mixer = "ad_core.testing.toys:Ema"
                cases = "ad_core.testing.toys:EMA_CASES"
                {attribute}
            """
        )
        return pytester.runpytest("-p", "no:cacheprovider")

    return run


def test_a_window_longer_than_the_tests_is_refused():
    case = Case("long", lambda *size: {**RECALL_CASES[0].make(*size), "window": 1000})
    assert run_checks(Recall(), [case]).red == {"window"}


def test_a_kernel_for_another_device_or_without_its_requirement_is_absent_with_a_reason():
    class Elsewhere(EmaSlots):
        devices = frozenset({"cuda"})

    class Wants(RecallPaged):
        requires = ("no-such-package-at-all>=2", "torch>=1")

    class TooOld(RecallPaged):
        requires = ("torch<1",)

    assert "cuda" in absence(Elsewhere(), "cpu")
    assert "no-such-package-at-all" in absence(Wants(), "cpu")
    assert "torch<1" in absence(TooOld(), "cpu")
    assert absence(RecallPaged(), "cpu") is None
