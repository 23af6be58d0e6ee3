"""The kit: a plugin's test subclasses `MixerConformance` (`OpConformance` for an op without memory), and every check that concerns
it runs on every kernel and case.

    class TestAttention(MixerConformance):
        mixer = "ad_toy.mixer:Mix"
        cases = "ad_toy.testing:CASES"
        min_checks = 100

Test ids are check, kernel and case: `pytest -k "decode and torch"`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, ClassVar

import pytest
from packaging.requirements import Requirement

from ad_core.api import CanonicalOp, Declined, Kernel
from ad_core.api.errors import ConfigError
from ad_core.testing import kernel_checks, op_checks
from ad_core.testing.cases import Case
from ad_core.testing.subject import Subject

OP_CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check for check in (op_checks.schema, op_checks.fake, op_checks.causality, op_checks.tokens_apart, op_checks.float64)
}


@dataclass
class Report:
    """What `run_checks` saw. Ids are "check[case]" for the canonical op and "check[kernel-case]" for kernels."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def red(self) -> set[str]:
        """Names of the checks that failed somewhere."""
        return {name.split("[", 1)[0] for name in self.failed}


def run_checks(mixer: CanonicalOp, cases: Sequence[Case], kernels: Sequence[Kernel] | None = None, *, device: str = "cpu") -> Report:
    """Every check without pytest: for notebooks, and for tests of the kit itself."""
    report = Report()
    for case in cases:
        for name, check in OP_CHECKS.items():
            subject = Subject(mixer, case, None, device, _interpreting())
            if _concerns(f"op_{name}", subject):
                _record(report, f"op_{name}[{case.name}]", check, subject)
        for kernel in mixer.kernels if kernels is None else kernels:
            for name, check in kernel_checks.KERNEL_CHECKS.items():
                subject = Subject(mixer, case, kernel, device, _interpreting())
                if _concerns(name, subject):
                    _record(report, f"{name}[{kernel.name}-{case.name}]", check, subject)
    return report


def _concerns(check: str, subject: Subject) -> bool:
    """Whether the check asks something of the subject: some ask about one kind of memory, or about having none."""
    match check:
        case "window":
            return subject.windowed
        case "op_tokens_apart":
            return not subject.remembers
        case "page_boundary" | "permutation":
            return subject.remembers
    return True


def _record(report: Report, name: str, check: Callable[[Subject], None], subject: Subject) -> None:
    if (reason := _declined(subject, check)) is not None:
        report.skipped[name] = reason
        return
    try:
        check(subject)
        assert subject.compared, "the check compared nothing"
    except Exception as error:  # whatever a broken kernel raises is its verdict
        report.failed[name] = f"{type(error).__name__}: {error}"
    else:
        report.passed.append(name)


def _declined(subject: Subject, check: Callable[[Subject], None]) -> str | None:
    if subject.kernel is None or check is kernel_checks.supports:
        return None
    answer = subject.declines()
    return answer.reason if isinstance(answer, Declined) else None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _resolve(value: Any) -> Any:
    """An object, or what "package.module:name" names; a class is instantiated."""
    if isinstance(value, str):
        module, _, name = value.partition(":")
        value = getattr(importlib.import_module(module), name)
    return value() if isinstance(value, type) else value


def absence(kernel: Kernel, device: str) -> str | None:
    """Why the kernel cannot run here at all, or None: its devices, and its requirements read from installed metadata."""
    if device not in kernel.devices:
        return f"runs on {', '.join(sorted(kernel.devices))}, not on {device}"
    for text in kernel.requires:
        requirement = Requirement(text)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return f"needs {text}, which is not installed"
        if not requirement.specifier.contains(version, prereleases=True):
            return f"needs {text}, installed is {version}"
    return None


class MixerConformance:
    """Subclass with a name that starts with "Test". Class attributes: `mixer` (object, class or "module:Class"), `cases` (list or
    "module:LIST"), `kernels` (names; None is all), `device`, `min_checks` (fewer generated tests than that is a failure)."""

    mixer: ClassVar[Any]
    cases: ClassVar[Any]
    kernels: ClassVar[Sequence[str] | None] = None
    device: ClassVar[str] = "cpu"
    min_checks: ClassVar[int] = 1

    _generated: ClassVar[int] = 0
    _found: ClassVar[tuple[CanonicalOp, Sequence[Case]]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test a case for checks of the op; one a kernel and case for checks of kernels."""
        if "subject" not in metafunc.fixturenames:
            return
        kind = type(self)
        mixer, cases = kind._resolved()
        method = metafunc.function.__name__
        subjects, ids = [], []
        if method.startswith("test_op_"):
            every = [Subject(mixer, case, None, kind.device, _interpreting()) for case in cases]
            subjects = [subject for subject in every if _concerns(method.removeprefix("test_"), subject)]
            ids = [subject.case.name for subject in subjects]
        else:
            for kernel in self._kernels(mixer):
                for case in cases:
                    subject = Subject(mixer, case, kernel, kind.device, _interpreting())
                    if _concerns(method.removeprefix("test_"), subject):
                        subjects.append(subject)
                        ids.append(f"{kernel.name}-{case.name}")
        kind._generated += len(subjects)
        metafunc.parametrize("subject", subjects, ids=ids)

    @classmethod
    def _resolved(cls) -> tuple[CanonicalOp, Sequence[Case]]:
        if "_found" not in cls.__dict__:
            cls._found = (_resolve(cls.mixer), _resolve(cls.cases))
        return cls._found

    @classmethod
    def _kernels(cls, mixer: CanonicalOp) -> list[Kernel]:
        named = [kernel for kernel in mixer.kernels if cls.kernels is None or kernel.name in cls.kernels]
        for name in cls.kernels or ():
            if name not in {kernel.name for kernel in named}:
                raise ConfigError(
                    f"{mixer.name} has no kernel {name!r}", where=cls.__name__, hint=f"it has {[k.name for k in mixer.kernels]}"
                )
        return [kernel for kernel in named if absence(kernel, cls.device) is None]

    @pytest.fixture(autouse=True)
    def _must_compare(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Skips what the kernel declines, with its reason; a check that compared nothing fails."""
        subject = request.getfixturevalue("subject") if "subject" in request.fixturenames else None
        if subject is not None:
            subject.compared = 0
            if (
                reason := _declined(
                    subject, kernel_checks.supports if request.function.__name__ == "test_supports" else kernel_checks.prefill
                )
            ) is not None:
                pytest.skip(f"declined: {reason}")
        yield
        if subject is not None:
            assert subject.compared, "the check compared nothing"

    def test_op_schema(self, subject: Subject) -> None:
        op_checks.schema(subject)

    def test_op_fake(self, subject: Subject) -> None:
        op_checks.fake(subject)

    def test_op_causality(self, subject: Subject) -> None:
        op_checks.causality(subject)

    def test_op_tokens_apart(self, subject: Subject) -> None:
        op_checks.tokens_apart(subject)

    def test_op_float64(self, subject: Subject) -> None:
        op_checks.float64(subject)

    def test_cached_op(self, subject: Subject) -> None:
        kernel_checks.cached_op(subject)

    def test_supports(self, subject: Subject) -> None:
        kernel_checks.supports(subject)

    def test_float64(self, subject: Subject) -> None:
        kernel_checks.float64(subject)

    def test_prefill(self, subject: Subject) -> None:
        kernel_checks.prefill(subject)

    def test_decode(self, subject: Subject) -> None:
        kernel_checks.decode(subject)

    def test_chunks(self, subject: Subject) -> None:
        kernel_checks.chunks(subject)

    def test_ragged(self, subject: Subject) -> None:
        kernel_checks.ragged(subject)

    def test_strides(self, subject: Subject) -> None:
        kernel_checks.strides(subject)

    def test_page_boundary(self, subject: Subject) -> None:
        kernel_checks.page_boundary(subject)

    def test_permutation(self, subject: Subject) -> None:
        kernel_checks.permutation(subject)

    def test_padding(self, subject: Subject) -> None:
        kernel_checks.padding(subject)

    def test_mutation(self, subject: Subject) -> None:
        kernel_checks.mutation(subject)

    def test_dirty_memory(self, subject: Subject) -> None:
        kernel_checks.dirty_memory(subject)

    def test_independence(self, subject: Subject) -> None:
        kernel_checks.independence(subject)

    def test_window(self, subject: Subject) -> None:
        kernel_checks.window(subject)

    def test_enough_checks_exist(self) -> None:
        """Of the whole class, whatever was selected: a kernel or a case that disappears must not go unnoticed."""
        assert type(self)._generated >= self.min_checks, f"{type(self)._generated} checks were generated, {self.min_checks} are promised"


class OpConformance(MixerConformance):
    """The same for a canonical op without memory: `op` names it, in the place of `mixer`. Packed batches drive its kernels too."""

    op: ClassVar[Any]

    @classmethod
    def _resolved(cls) -> tuple[CanonicalOp, Sequence[Case]]:
        if "_found" not in cls.__dict__:
            cls._found = (_resolve(cls.op), _resolve(cls.cases))
        return cls._found
