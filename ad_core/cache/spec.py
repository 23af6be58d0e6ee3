"""What a model's mixers keep, in numbers: all that the page manager and the scheduler need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageGroupSpec:
    """Resources with an equal window: one allocator, one page table."""

    window: int | None
    page_bytes: int
    """Bytes of one page over all resources of the group."""


@dataclass(frozen=True)
class CacheSpec:
    """Page groups and slots of one model. Without slots `slot_bytes` is 0."""

    page_size: int
    groups: tuple[PageGroupSpec, ...]
    slot_bytes: int = 0
    checkpoints: bool = True
    """All slot states can be restored from a copy."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one more token costs while it is inside every window."""
        return sum(group.page_bytes for group in self.groups) // self.page_size
