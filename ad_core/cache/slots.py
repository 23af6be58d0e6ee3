"""The states of sequences that have a fixed size: one slot a running sequence, and checkpoints in the slots that are left."""

from __future__ import annotations

from collections.abc import Callable

from ad_core.cache.units import UnitAllocator


class SlotStore:
    """Slots of live sequences and checkpoints, copies of a state at a token boundary.

    Both come from one pool of `size` slots (slot 0 is null), so checkpoints are bounded by it: a live sequence may evict
    the least recently used checkpoint, a checkpoint never takes a live sequence's slot. `copy(source, target)` copies all
    of a slot's states in order with the steps of the model.
    """

    def __init__(self, size: int, copy: Callable[[int, int], None], evicted: Callable[[int], None]):
        self.units = UnitAllocator(size, evicted)
        self._copy = copy

    def start(self, checkpoint: int) -> int:
        """A slot for a sequence: with the checkpoint's state, or 0 for none, in which case the first step zeroes it.

        Returns 0, and changes nothing, if there is no slot left beside the checkpoint's.
        """
        if checkpoint:
            self.units.retain(checkpoint)
        slot = self.units.take() if self.units.available else 0
        if checkpoint:
            if slot:
                self._copy(checkpoint, slot)
            self.units.release(checkpoint)
        return slot

    def save(self, slot: int) -> int:
        """A checkpoint of the slot's state as it is now, cached; 0 if live sequences hold every slot."""
        if not self.units.available:
            return 0
        checkpoint = self.units.take()
        self._copy(slot, checkpoint)
        self.units.keep(checkpoint)
        self.units.release(checkpoint)
        return checkpoint
