"""Kernels for all calls of one model: calls that look alike are decided once, and the plan lists whom a decision covers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ad_core.api.mixer import Kernel
from ad_core.api.types import Environment, OpCall
from ad_core.plan import Decision
from ad_core.registry.arbitrate import choose_kernel
from ad_core.registry.registry import Registry


class KernelChoices:
    """Answers `choose` for every call of a model, and holds the decisions for the plan."""

    def __init__(self, registry: Registry, environment: Environment, kernels: Mapping[str, str], prefer: Sequence[str]):
        self._registry, self._environment = registry, environment
        self._kernels, self._prefer = kernels, prefer
        self._made: dict[Hashable, tuple[Kernel | None, Decision, list[str]]] = {}

    def choose(self, call: OpCall) -> Kernel | None:
        """The kernel that serves the call; None for an op without memory that computes itself. Raises as `choose_kernel`."""
        key = (call.op, *((name, _kind(value)) for name, value in call.arguments.items()))
        if key not in self._made:
            offer, decision = choose_kernel(call, self._registry, self._environment, kernels=self._kernels, prefer=self._prefer)
            self._made[key] = (offer.item if offer else None, decision, [])
        kernel, _, members = self._made[key]
        members.append(call.module or call.node)
        return kernel

    @property
    def decisions(self) -> list[Decision]:
        """One for each kind of call, with the places that it covers."""
        return [replace(decision, members=tuple(members)) for _, decision, members in self._made.values()]


def _kind(value: Any) -> Hashable:
    """What may make a difference to a kernel: shape (dynamic sizes are alike), dtype, and constants themselves."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return (*(extent if isinstance(extent, int) else "dynamic" for extent in shape), str(value.dtype))
    return repr(value)
