"""From a number of bytes to numbers of pages and slots."""

from __future__ import annotations

from dataclasses import dataclass

from ad_core.api.errors import OutOfMemoryBudgetError
from ad_core.api.types import Limits
from ad_core.cache.spec import CacheSpec
from ad_core.progress import megabytes


@dataclass(frozen=True)
class PoolSizes:
    """How many pages each group has and how many slots there are, null ones included, and what that takes in bytes."""

    num_pages: tuple[int, ...]
    num_slots: int
    num_bytes: int

    def capacity_tokens(self, page_size: int) -> int:
        """Tokens that the smallest unwindowed group holds (of all groups, if each has a window)."""
        return min((pages - 1) * page_size for pages in self.num_pages) if self.num_pages else 0


def sizes_for(spec: CacheSpec, limits: Limits, memory: int, checkpoint_interval: int | None = None) -> PoolSizes:
    """The largest pools that fit into `memory` bytes and that the limits can make use of.

    Slots come first, one a running sequence. A windowed group never needs more than the window and one step's tokens a
    sequence; what is left is divided so that every unwindowed token finds its pages. With a `checkpoint_interval` there are
    also slots for saved states, one every so many tokens, but never more bytes of them than of pages. Raises
    `OutOfMemoryBudgetError` if not even one sequence of one page fits.
    """
    saves = checkpoint_interval if spec.slot_bytes and spec.checkpoints else None

    def pages_for(blocks: int) -> tuple[int, ...]:
        """Pages of each group for `blocks` pages' worth of tokens over all sequences, the null page included."""
        pages = []
        for group in spec.groups:
            wanted = blocks
            if group.window is not None:
                a_sequence = -(-(group.window + limits.max_tokens) // spec.page_size) + 1
                wanted = min(blocks, limits.max_sequences * min(a_sequence, limits.max_pages))
            pages.append(wanted + 1)
        return tuple(pages)

    def page_bytes_for(blocks: int) -> int:
        return sum(count * group.page_bytes for count, group in zip(pages_for(blocks), spec.groups, strict=True))

    def slots_for(blocks: int) -> int:
        """A slot of each running sequence, the null slot, and those that are left for saved states."""
        if not spec.slot_bytes:
            return 0
        saved = blocks * spec.page_size // saves if saves else 0
        return limits.max_sequences + 1 + (min(saved, page_bytes_for(blocks) // spec.slot_bytes) if spec.groups else saved)

    def bytes_for(blocks: int) -> int:
        return slots_for(blocks) * spec.slot_bytes + page_bytes_for(blocks)

    low, high = 1, limits.max_sequences * limits.max_pages
    if bytes_for(low) > memory:
        states = f" and the states of {limits.max_sequences} sequences" if spec.slot_bytes else ""
        raise OutOfMemoryBudgetError(
            f"the memory budget of {megabytes(memory)} cannot hold the cache",
            why=f"one page of each pool beside the null page{states} take {megabytes(bytes_for(low))}",
            hint=f"raise `memory`, or lower `page_size`{' or `max_requests`' if states else ''}",
        )
    while low < high:  # the most blocks that fit: bytes grow with blocks
        middle = (low + high + 1) // 2
        if bytes_for(middle) <= memory:
            low = middle
        else:
            high = middle - 1
    return PoolSizes(pages_for(low), slots_for(low), bytes_for(low))
