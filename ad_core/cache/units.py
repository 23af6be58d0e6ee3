"""Who holds which unit of a pool: the bookkeeping that pages and slots share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from ad_core.api.errors import CacheAuditError


class UnitAllocator:
    """Hands out the units 1 to `size` - 1 of a pool; unit 0 is null and is never handed out.

    Every unit is in exactly one state:

        free     nobody holds it and its content is worthless
        cached   nobody holds it, but its content can be found again; the least recently used is taken first
        owned    held once or more

    `evicted(unit)` is called when a cached unit is about to be used for something else: whoever can find its content must
    forget it. All calls are O(1). Misuse (an unheld unit released, a take when nothing is available) raises `CacheAuditError`.
    """

    def __init__(self, size: int, evicted: Callable[[int], None]):
        self.size = size
        self._evicted = evicted
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, size))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * size
        self._kept = bytearray(size)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        return self.size - 1 - self.num_free - self.num_cached

    @property
    def available(self) -> int:
        """Units that `take` can still give."""
        return self.num_free + self.num_cached

    def free_units(self) -> list[int]:
        """The free units, for tests that poison them."""
        return list(self._free)

    def take(self) -> int:
        """A unit, held once by the caller. Evicts the least recently used cached one if none is free."""
        unit = self._pop_free() if self.num_free else self._evict()
        self._holders[unit] = 1
        return unit

    def retain(self, unit: int) -> None:
        """One more holder of an owned or cached unit."""
        if self._holders[unit] == 0:
            if unit not in self._cached:
                raise CacheAuditError(f"unit {unit} is shared although nobody holds it and it is not cached")
            del self._cached[unit]
        self._holders[unit] += 1

    def release(self, unit: int) -> None:
        """One holder less. Without any, the unit is cached if `keep` was called for it, else free."""
        if self._holders[unit] < 1:
            raise CacheAuditError(f"unit {unit} is released although nobody holds it")
        self._holders[unit] -= 1
        if self._holders[unit]:
            return
        if self._kept[unit]:
            self._cached[unit] = None
        else:
            self._push_free(unit)

    def keep(self, unit: int) -> None:
        """The content of an owned unit can be found from now on, so it survives its holders until it is evicted."""
        if self._holders[unit] < 1:
            raise CacheAuditError(f"the content of unit {unit} is published although nobody holds it")
        self._kept[unit] = 1

    def drop(self, unit: int) -> None:
        """The content cannot be found any more. The caller has forgotten it; `evicted` is not called."""
        self._kept[unit] = 0
        if unit in self._cached:
            del self._cached[unit]
            self._push_free(unit)

    def audit(self, holders: Mapping[int, int], findable: set[int]) -> None:
        """Raises `CacheAuditError` unless every unit is in one state, held as often as `holders` says, and cached or kept
        exactly if it is `findable`."""
        free = self.free_units()
        total = len(free) + self.num_cached + len(holders)
        if total != self.size - 1 or len({*free, *self._cached, *holders}) != total or 0 in holders or not self._in_range(free):
            raise CacheAuditError(
                "the units of a pool are not each in one state",
                why=f"free {len(free)} + cached {self.num_cached} + owned {len(holders)} is {total}, the pool has {self.size - 1}",
            )
        for unit in range(1, self.size):
            if self._holders[unit] != holders.get(unit, 0):
                raise CacheAuditError(f"unit {unit} counts {self._holders[unit]} holders and has {holders.get(unit, 0)}")
        kept = {unit for unit in range(self.size) if self._kept[unit]}
        if kept != findable or not kept.issuperset(self._cached):
            raise CacheAuditError("what is kept is not what can be found", why=f"they differ in the units {sorted(kept ^ findable)}")

    def _in_range(self, units: list[int]) -> bool:
        return all(0 < unit < self.size for unit in units)

    def _evict(self) -> int:
        if not self._cached:
            raise CacheAuditError("a unit is taken from a pool in which every unit is owned", why=f"it has {self.size - 1} units")
        unit, _ = self._cached.popitem(last=False)
        self._kept[unit] = 0
        self._evicted(unit)
        return unit

    def _pop_free(self) -> int:
        return self._free.popitem(last=False)[0]

    def _push_free(self, unit: int) -> None:
        self._free[unit] = None
