"""How a value reacts when some tokens of the input change: which axes its tokens can still lie along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ad_core.graph.axes import Axis

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
_COARSE = 0.1
"""For floats of one byte."""


@dataclass(frozen=True)
class Verdict:
    """What a trial found for one value: `axis` of its tokens (None: it does not depend on them), or why they mix. `counted`: it does
    not depend on them and differs from one to the next."""

    axis: Axis | None = None
    mixes: str | None = None
    counted: bool = False


class Reaction:
    """One value, watched over several changes of the input. `base` is the value before any; `by_shape` the axis that its shape suggests."""

    def __init__(self, base: Any, length: int, by_shape: Axis | None):
        self._parts = list(_tensors(base))
        self._numbers = [part for part in _leaves(base) if not isinstance(part, torch.Tensor)]
        self._length, self._by_shape = length, by_shape
        self._possible = [_axes(part.shape, length) for part in self._parts]
        self._reacted = [False] * len(self._parts)
        self.mixes: str | None = None

    def see(self, value: Any, changed: torch.Tensor) -> None:
        """`value` is what came out when the tokens `changed` ([S] bool) were others. It may differ at those tokens only."""
        if [part for part in _leaves(value) if not isinstance(part, torch.Tensor)] != self._numbers:
            self.mixes = "reads a number out of the tokens"
        for index, (base, other) in enumerate(zip(self._parts, _tensors(value), strict=True)):
            if base.shape != other.shape:
                self.mixes = "its shape depends on the tokens' values"
                return
            differs = _differs(base, other)
            if bool(differs.any()):
                self._reacted[index] = True
                self._possible[index] = [axis for axis in self._possible[index] if _within(differs, axis, changed)]
                if not self._possible[index]:
                    self.mixes = "changes at other tokens than those that change"

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be learnt."""
        return self.mixes is not None

    @property
    def silent(self) -> bool:
        """Whether nothing was learnt: it never changed, or has no numbers that could."""
        return self.mixes is None and not (any(self._reacted) and self._finite)

    @property
    def verdict(self) -> Verdict:
        """Of several tensors the first that reacted tells the axis. A value that never did does not depend on the tokens; if it differs
        from one to the next all the same, something counted them."""
        if self.mixes is not None:
            return Verdict(mixes=self.mixes)
        if not self._finite:
            return Verdict(mixes="gave no finite numbers, so nothing is proved")
        if not any(self._reacted) and any(self._varies(part) for part in self._parts):
            return Verdict(mixes="differs from token to token, whatever they are", counted=True)
        return Verdict(next((self._possible[index][0] for index, reacted in enumerate(self._reacted) if reacted), self._by_shape))

    def _varies(self, part: torch.Tensor) -> bool:
        if self._by_shape is None or self._by_shape.dim >= part.dim() or part.shape[self._by_shape.dim] != self._length:
            return False
        return bool(_differs(part, part.narrow(self._by_shape.dim, 0, 1).expand_as(part)).any())

    @property
    def _finite(self) -> bool:
        return all(bool(torch.isfinite(part).any()) for part in self._parts if part.numel())


def _leaves(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (part for part in _leaves(value) if isinstance(part, torch.Tensor))


def _axes(shape: Sequence[int], length: int) -> list[Axis]:
    """Every way in which the tokens can lie in a tensor of this shape."""
    found = []
    for dim, size in enumerate(shape):
        if size % length == 0 and size > 0:
            rest = size // length
            found += [Axis(dim, outer, rest // outer) for outer in range(1, rest + 1) if rest % outer == 0]
    return found


def _differs(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two results differ by more than rounding."""
    if not (base.is_floating_point() or base.is_complex()):
        return base != other
    if base.dtype.itemsize < 2:
        base, other = base.float(), other.float()
        tolerance = _COARSE
    else:
        tolerance = _TOLERANCE.get(base.dtype, 1e-4)
    finite = base[torch.isfinite(base)]
    scale = float(finite.abs().double().mean()) if finite.numel() else 1.0
    return ~torch.isclose(base, other, rtol=tolerance, atol=tolerance * max(scale, 1e-12), equal_nan=True)


def _within(differs: torch.Tensor, axis: Axis, changed: torch.Tensor) -> bool:
    """Whether all differences lie at changed tokens, if the tokens lie along `axis`."""
    token = (torch.arange(differs.shape[axis.dim]) // axis.inner) % len(changed)
    return not bool(differs.movedim(axis.dim, 0)[~changed[token]].any())
