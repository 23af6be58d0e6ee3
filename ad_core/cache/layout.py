"""What the inputs of a cached graph are, in order: the ids, batch fields, pools and kernel buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ad_core.api.mixer import Kernel
from ad_core.api.resources import BufferSpec, PagedTokens, Resource, SlotState
from ad_core.api.types import Limits, OpCall
from ad_core.cache.spec import CacheSpec, PageGroupSpec

SLOTS = -1
"""The page group of a call that keeps no pages."""


@dataclass(frozen=True)
class IdsInput:
    """The packed token ids, [1, T]."""


@dataclass(frozen=True)
class FieldInput:
    """A batch field; `group` is the page group of a grouped field."""

    name: str
    group: int = 0


@dataclass(frozen=True)
class PoolInput:
    """A pool. `group` is the page group of paged tokens, -1 for slots."""

    name: str
    resource: Resource
    group: int


@dataclass(frozen=True)
class BufferInput:
    """A kernel's own tensor: which preparation fills it, and its name there."""

    preparation: int
    name: str
    spec: BufferSpec


Input = IdsInput | FieldInput | PoolInput | BufferInput


@dataclass(frozen=True)
class Preparation:
    """One `Kernel.prepare` a step: for all calls of the kernel with one group key, in one page group."""

    kernel: Kernel
    call: OpCall
    group: int
    buffers: Mapping[str, BufferSpec] = field(hash=False)


@dataclass
class CacheLayout:
    """Inputs of the cached graph by placeholder, in order, and what has to be prepared before each step."""

    limits: Limits
    windows: tuple[int | None, ...] = ()
    inputs: list[Input] = field(default_factory=list)
    preparations: list[Preparation] = field(default_factory=list)

    @property
    def pools(self) -> list[PoolInput]:
        return [entry for entry in self.inputs if isinstance(entry, PoolInput)]

    def spec(self) -> CacheSpec:
        """The layout in bytes, for the page manager."""
        groups = []
        for index, window in enumerate(self.windows):
            paged = [pool.resource for pool in self.pools if pool.group == index and isinstance(pool.resource, PagedTokens)]
            groups.append(PageGroupSpec(window, sum(resource_bytes(each) * each.entries(self.limits.page_size) for each in paged)))
        slots = [pool.resource for pool in self.pools if isinstance(pool.resource, SlotState)]
        return CacheSpec(
            page_size=self.limits.page_size,
            groups=tuple(groups),
            slot_bytes=sum(resource_bytes(slot) for slot in slots),
            checkpoints=all(slot.checkpoint for slot in slots),
        )


def resource_bytes(resource: Resource) -> int:
    """Bytes of one entry of a page, or of one slot."""
    shape = resource.per_token if isinstance(resource, PagedTokens) else resource.shape
    count = 1
    for extent in shape:
        count *= int(extent)
    return count * resource.dtype.itemsize
