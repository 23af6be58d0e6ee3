"""What a check looks at: a mixer or an op without memory, one case, one kernel; and how it compares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ad_core.api import CanonicalOp, Declined, Environment, Kernel, Mixer, PagedTokens
from ad_core.testing.calls import invoke, on_device, symbolic_call
from ad_core.testing.cases import Case, in_float64
from ad_core.testing.harness import Harness, Outputs


@dataclass
class Subject:
    """`kernel` is None for the checks of the canonical op. `compared` counts comparisons: a check that made none proves nothing."""

    mixer: CanonicalOp
    case: Case
    kernel: Kernel | None = None
    device: str = "cpu"
    interpret: bool = False
    compared: int = field(default=0)

    def environment(self, page_size: int = 16) -> Environment:
        capability = torch.cuda.get_device_capability() if self.device == "cuda" else None
        return Environment(self.device, capability, page_size, self.interpret)

    def declines(self, dtype: torch.dtype = torch.float32) -> Declined | None:
        """The kernel's answer to the case, dtypes included."""
        assert self.kernel is not None
        if str(dtype).removeprefix("torch.") not in self.kernel.dtypes:
            return Declined(f"{dtype} is not among its dtypes")
        return self.kernel.supports(symbolic_call(self.mixer, self.case, dtype, self.device), self.environment())

    @property
    def remembers(self) -> bool:
        """Is it a mixer, which keeps memory between steps?"""
        return isinstance(self.mixer, Mixer)

    @property
    def windowed(self) -> bool:
        """Does the case keep tokens in a window only?"""
        if not isinstance(self.mixer, Mixer):
            return False
        resources = self.mixer.resources(symbolic_call(self.mixer, self.case, torch.float32, self.device), self.case.options)
        return any(isinstance(resource, PagedTokens) and resource.window is not None for resource in resources.values())

    def arguments(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return on_device(self.case.arguments(batch, length, dtype), torch.device(self.device))

    def harness(self, **options: Any) -> Harness:
        """A fresh one for this kernel and case."""
        assert self.kernel is not None
        return Harness(self.mixer, self.kernel, self.case, device=self.device, **options)

    def expected(self, harness: Harness) -> Outputs:
        """The canonical op in float64 over the harness's whole sequences, [sequences, length, ...]."""
        return invoke(self.mixer.op, in_float64(harness.data))

    # -- comparisons ----------------------------------------------------------------------------------------------------

    def equal(self, actual: Any, expected: Any, what: str) -> None:
        self.compared += 1
        assert actual == expected, f"{what}: {actual} instead of {expected}"

    def close(self, actual: Outputs, expected: Sequence[torch.Tensor], what: str, dtype: torch.dtype = torch.float32) -> None:
        """Each result within the case's tolerance for `dtype` of the expected value, and finite."""
        self.equal(len(actual), len(expected), f"{what}: number of results")
        for result, truth in zip(actual, expected, strict=True):
            self.compared += 1
            assert result.shape == truth.shape, f"{what}: shape {tuple(result.shape)} instead of {tuple(truth.shape)}"
            if not result.is_floating_point():
                assert torch.equal(result, truth), f"{what}: integers differ"
                continue
            assert bool(result.isfinite().all()), f"{what}: {int((~result.isfinite()).sum())} of {result.numel()} values are not finite"
            if result.numel() == 0:
                continue
            difference = (result.double() - truth.double()).abs()
            allowed = self.case.tolerance[dtype] * max(1.0, float(truth.abs().max()))
            assert float(difference.max()) <= allowed, (
                f"{what}: largest difference {float(difference.max()):.2e}, allowed {allowed:.2e}, "
                f"first at {tuple((difference > allowed).nonzero()[0].tolist())}"
            )

    def follow(self, harness: Harness, steps: Sequence[Sequence[tuple[int, int]]], what: str) -> None:
        """Runs the steps; every output must be what the canonical op gives there."""
        expected = self.expected(harness)
        for number, work in enumerate(steps):
            starts = {index: harness.sequences[index].context for index, _ in work}
            outputs = harness.step(work)
            for index, count in work:
                part = slice(starts[index], starts[index] + count)
                self.close(
                    outputs[index],
                    [truth[index, part] for truth in expected],
                    f"{what}, step {number}, sequence {index}, tokens {part.start} to {part.stop}",
                )


@functools.cache
def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name such as "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
