"""The pages of one page group, handed out so that a sequence's pages follow each other where that is possible."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from ad_core.cache.units import UnitAllocator

NO_RUN = range(0)


class PageAllocator(UnitAllocator):
    """A `UnitAllocator` that prefers ascending neighbours: kernels read such a sequence as one slice, without a gather.

    A sequence that starts claims a run of free pages for what it is expected to need. A claim is a wish and no lock:
    claimed pages are free, and others get them once nothing else is left.
    """

    def __init__(self, size: int, evicted: Callable[[int], None]):
        super().__init__(size, evicted)
        self._claimed: OrderedDict[int, None] = OrderedDict()
        self._open = bytearray(b"\0" + b"\1" * (size - 1))  # 1: free and not claimed; a byte each, so that `find` finds runs

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._claimed)

    def free_units(self) -> list[int]:
        return [*self._free, *self._claimed]

    def claim(self, needed: int, hoped: int, after: int = 0) -> range:
        """Sets a run of consecutive free pages aside: `hoped` pages, or just `needed` (for which cached pages are evicted).

        Best right behind page `after`. An empty range if the free pages are too scattered.
        """
        start = self._find_run(hoped, after)
        if start < 0:
            hoped = needed
            while len(self._free) < needed and self._cached:
                self._push_free(self._evict())
            start = self._find_run(needed, after)
        if start < 0 or hoped < 1:
            return NO_RUN
        for page in range(start, start + hoped):
            del self._free[page]
            self._claimed[page] = None
        self._open[start : start + hoped] = bytes(hoped)
        return range(start, start + hoped)

    def unclaim(self, run: range) -> None:
        """Gives back what is left of a claim."""
        for page in run:
            if page in self._claimed:
                del self._claimed[page]
                self._push_free(page)

    def take_near(self, *preferred: int) -> int:
        """`take`, but the first of the `preferred` pages that is free."""
        for page in preferred:
            if page in self._claimed:
                del self._claimed[page]
            elif page in self._free:
                del self._free[page]
                self._open[page] = 0
            else:
                continue
            self._holders[page] = 1
            return page
        return self.take()

    def take(self) -> int:
        # A page that another sequence claims costs that one its slices; a cached one costs somebody a recomputation
        # at worst. Claims are small and short, so cached pages go first.
        if not self._free and self._cached:
            page = self._evict()
            self._holders[page] = 1
            return page
        return super().take()

    def _find_run(self, count: int, after: int) -> int:
        run = b"\1" * count
        return after + 1 if after and self._open.startswith(run, after + 1) else self._open.find(run)

    def _pop_free(self) -> int:
        if not self._free:
            return self._claimed.popitem()[0]
        page = super()._pop_free()
        self._open[page] = 0
        return page

    def _push_free(self, unit: int) -> None:
        super()._push_free(unit)
        self._open[unit] = 1
