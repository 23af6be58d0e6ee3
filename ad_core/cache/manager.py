"""Who owns which page and slot. It knows sequences of tokens; it knows nothing of requests, models or tensors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ad_core.api.errors import CacheAuditError, ConfigError, OutOfMemoryBudgetError
from ad_core.cache.pages import PageAllocator
from ad_core.cache.prefix import Block, PrefixStore
from ad_core.cache.reuse import Content, Reuse, first_live_block, reusable_blocks
from ad_core.cache.slots import SlotStore
from ad_core.cache.spec import CacheSpec

MOST_EXTRA_PAGES = 64
"""Pages beyond the prompt that a sequence claims in advance, at most."""


@dataclass(eq=False)
class SequenceCache:
    """One sequence's share of the cache. Only the manager changes it.

    `pages[group][block]` is the page of a block, 0 once its tokens left the window. `computed` counts the tokens whose
    entries are written; `num_blocks` blocks have pages (or had), `promised` will have when the tokens that the sequence
    was admitted with are computed.
    """

    pages: tuple[list[int], ...]
    slot: int
    computed: int
    num_blocks: int
    reuse: Reuse
    tip: Block
    """The last block that is in the prefix store."""
    published: int
    """Blocks of the sequence that are in the prefix store."""
    promised: int
    claims: list[range] = field(default_factory=list)
    first_live: list[int] = field(default_factory=list)
    """The first block of every group whose page is not given back yet."""


class _Held(NamedTuple):
    """A block of a live sequence, as content that another one may share."""

    pages: Sequence[int]
    checkpoint: int = 0


def _no_copy(source: int, target: int) -> None:
    raise CacheAuditError("a state is to be copied, but the manager was made without a way to copy slots")


class CacheManager:
    """Pages of every group, slots, and the prefixes that are still in them.

    `num_pages` and `num_slots` are the pools' sizes, null units included. `copy_slot(source, target)` copies a slot's states,
    ordered with the steps of the model. With `prefix_reuse` off nothing outlives its sequence. Raises `ConfigError` or
    `OutOfMemoryBudgetError` for sizes that cannot work.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_pages: Sequence[int],
        num_slots: int = 0,
        *,
        prefix_reuse: bool = True,
        checkpoint_interval: int = 256,
        copy_slot: Callable[[int, int], None] = _no_copy,
    ):
        if checkpoint_interval < 1 or checkpoint_interval % spec.page_size:
            raise ConfigError(f"checkpoint_interval {checkpoint_interval} is not a multiple of page_size {spec.page_size}")
        if len(num_pages) != len(spec.groups):
            raise ConfigError(f"{len(num_pages)} page counts are given for {len(spec.groups)} page groups")
        self.has_states = spec.slot_bytes > 0
        if any(pages < 2 for pages in num_pages) or (self.has_states and num_slots < 2):
            why = f"there are {tuple(num_pages)} pages and {num_slots} slots, of which number 0 is never used"
            raise OutOfMemoryBudgetError("the pools cannot hold one sequence", why=why)
        self.spec, self.page_size, self.prefix_reuse, self.checkpoint_interval = spec, spec.page_size, prefix_reuse, checkpoint_interval
        self.windows = tuple(group.window for group in spec.groups)
        self.store = PrefixStore(spec.page_size, len(spec.groups))
        self.groups = [PageAllocator(pages, partial(self.store.forget_page, group)) for group, pages in enumerate(num_pages)]
        self.slots = SlotStore(max(num_slots, 1), copy_slot, self.store.forget_checkpoint)
        self.saves_states = self.has_states and prefix_reuse and spec.checkpoints
        self.releases = 0
        """Grows whenever memory came back: whoever waits for some need not ask again before."""
        self._live: dict[int, SequenceCache] = {}
        self._fewest = [1 if window is None else (window + spec.page_size - 2) // spec.page_size + 1 for window in self.windows]

    def capacity(self) -> int:
        """Tokens that a sequence which has the cache for itself can hold; `sys.maxsize` if no length is too much."""
        return min((self._capacity_of(group) for group in range(len(self.groups))), default=sys.maxsize)

    def next_boundary(self, computed: int) -> int:
        """Where a chunk that starts at `computed` has to end at the latest, so that the state there can be saved."""
        return (computed // self.checkpoint_interval + 1) * self.checkpoint_interval if self.saves_states else sys.maxsize

    def admit(self, tokens: Sequence[int], *, expected: int = 0, donor: SequenceCache | None = None) -> SequenceCache | None:
        """A share for a sequence that is to compute `tokens`, with what of them is cached; None if memory lacks for now.

        At least one token is left to compute. `expected` is the length that the sequence may reach, a hint. `donor` is a
        live sequence that begins with the same tokens. Pages are taken by `extend`. What `tokens` needs must be there beside
        what the live sequences were admitted for and a page for each of them, so that no one is admitted to be preempted.
        """
        chain, reuse = self._match(tokens, donor)
        blocks = reuse.length // self.page_size
        total = -(-len(tokens) // self.page_size)
        firsts = [first_live_block(reuse.length, window, self.page_size) for window in self.windows]
        pages = tuple([0] * first + [chain[b].pages[g] for b in range(first, blocks)] for g, first in enumerate(firsts))
        for allocator, shared in zip(self.groups, pages, strict=True):
            for page in filter(None, shared):
                allocator.retain(page)
        needs = [self._owed(group, total, blocks, first) for group, first in enumerate(firsts)]
        fits = all(allocator.available >= needs[group] + self._promised(group) for group, allocator in enumerate(self.groups))
        checkpoint = chain[blocks - 1].checkpoint if blocks and self.has_states else 0
        slot = self.slots.start(checkpoint) if fits and self.has_states else 0
        if not fits or (self.has_states and not slot):
            for allocator, shared in zip(self.groups, pages, strict=True):
                for page in filter(None, reversed(shared)):
                    allocator.release(page)
            return None
        tip = chain[blocks - 1] if blocks else self.store.root
        cache = SequenceCache(
            pages, slot, reuse.length, blocks, reuse, tip if isinstance(tip, Block) else self.store.root, blocks, total, [], firsts
        )
        extra = min(-(-expected // self.page_size) - total, MOST_EXTRA_PAGES)
        cache.claims = [
            allocator.claim(need, need + max(extra, 0), own[-1] if own else 0)
            for allocator, need, own in zip(self.groups, needs, pages, strict=True)
        ]
        self.store.pin(cache.tip)
        self._live[id(cache)] = cache
        return cache

    def room(self, cache: SequenceCache) -> int:
        """The length up to which `extend` would succeed now."""
        available = min((allocator.available for allocator in self.groups), default=sys.maxsize)
        return (cache.num_blocks + available) * self.page_size

    def extend(self, cache: SequenceCache, length: int) -> bool:
        """Takes pages until the sequence can hold `length` tokens. Takes none and returns False if they do not suffice."""
        missing = -(-length // self.page_size) - cache.num_blocks
        if missing <= 0:
            return True
        if any(allocator.available < missing for allocator in self.groups):
            return False
        for allocator, pages, claim in zip(self.groups, cache.pages, cache.claims, strict=True):
            for _ in range(missing):
                behind = pages[-1] + 1 if pages and pages[-1] else 0
                pages.append(allocator.take_near(behind, claim.start))
        cache.num_blocks += missing
        return True

    def commit(self, cache: SequenceCache, tokens: Sequence[int], computed: int) -> None:
        """The entries (and state) of the first `computed` of `tokens` are written, and the tokens are accepted for good.

        Publishes full pages, saves the state at a checkpoint boundary, gives back pages that left their window.
        """
        cache.computed = computed
        full = computed // self.page_size
        if full > cache.published and self.prefix_reuse:
            self._publish(cache, tokens, full)
        if self.saves_states and computed and computed % self.checkpoint_interval == 0:
            self._save_state(cache)
        for group, window in enumerate(self.windows):
            if window is not None:
                self._leave_window(cache, group, min(first_live_block(computed, window, self.page_size), cache.num_blocks))

    def release(self, cache: SequenceCache, *, discard: bool = False) -> None:
        """Gives back all that the sequence holds. With `discard` nobody will find what it computed (it may be poisoned)."""
        del self._live[id(cache)]
        if discard:
            self._unpublish(cache)
        for allocator, pages, claim in zip(self.groups, cache.pages, cache.claims, strict=True):
            for page in filter(None, reversed(pages)):  # the last block first: a chain is evicted from its end
                allocator.release(page)
            allocator.unclaim(claim)
        if cache.slot:
            self.slots.units.release(cache.slot)
        self.store.unpin(cache.tip)
        self.releases += 1

    def audit(self) -> None:
        """Proves that each page and slot is in exactly one of free, cached and owned, or raises `CacheAuditError`."""
        for group, allocator in enumerate(self.groups):
            holders = Counter(page for cache in self._live.values() for page in cache.pages[group] if page)
            allocator.audit(holders, self.store.pages(group))
        self.slots.units.audit(Counter(cache.slot for cache in self._live.values() if cache.slot), self.store.checkpoints())
        self.store.audit(cache.tip for cache in self._live.values())
        for cache in self._live.values():
            if any(len(pages) != cache.num_blocks for pages in cache.pages) or cache.computed > cache.num_blocks * self.page_size > 0:
                raise CacheAuditError("a sequence has fewer pages than it has computed tokens")

    def _match(self, tokens: Sequence[int], donor: SequenceCache | None) -> tuple[Sequence[Content], Reuse]:
        limit = (len(tokens) - 1) // self.page_size
        if self.has_states and not self.spec.checkpoints:
            return (), Reuse(0, "states of this model cannot be restored from a copy")
        chain: Sequence[Content]
        if self.prefix_reuse:
            chain = self.store.walk(tokens, limit)
        elif donor is not None and not self.has_states:
            shared = min(limit, donor.computed // self.page_size)
            chain = [_Held(entry) for entry in zip(*(pages[:shared] for pages in donor.pages), strict=True)]
        else:
            return (), Reuse(0, "prefix reuse is off")
        blocks, obstacle = reusable_blocks(chain, self.windows, self.page_size, states=self.has_states)
        if blocks and self.has_states and self.slots.units.available < 2:
            return (), Reuse(0, "no slot is left beside the saved state")
        unit = self.checkpoint_interval if self.has_states else self.page_size
        if len(tokens) <= unit and not blocks:
            kind = "checkpoint interval" if self.has_states else "page"
            obstacle = f"the prompt is not longer than one {kind} of {unit} tokens"
        elif not obstacle:
            known = f"nothing behind its first {blocks * self.page_size} tokens" if blocks else "no prompt that begins so"
            obstacle = "one token at least is computed" if blocks == limit else f"{known} was cached"
        return chain, Reuse(blocks * self.page_size, obstacle)

    def _publish(self, cache: SequenceCache, tokens: Sequence[int], full: int) -> None:
        size, block = self.page_size, cache.tip
        for index in range(cache.published, full):
            block = self.store.descend(block, tokens[index * size : (index + 1) * size])
            for group, pages in enumerate(cache.pages):
                page = pages[index]
                # A twin may have published the same tokens first; this sequence's page then stays its own.
                if page and not block.pages[group]:
                    self.store.put_page(block, group, page)
                    self.groups[group].keep(page)
        self.store.pin(block)
        self.store.unpin(cache.tip)
        cache.tip, cache.published = block, full

    def _save_state(self, cache: SequenceCache) -> None:
        block = cache.tip
        if not block.checkpoint and (slot := self.slots.save(cache.slot)):
            self.store.put_checkpoint(block, slot)

    def _leave_window(self, cache: SequenceCache, group: int, first_live: int) -> None:
        pages, allocator = cache.pages[group], self.groups[group]
        for index in range(cache.first_live[group], first_live):
            if pages[index]:
                allocator.release(pages[index])
                pages[index] = 0
                self.releases += 1
        cache.first_live[group] = max(cache.first_live[group], first_live)

    def _unpublish(self, cache: SequenceCache) -> None:
        # What it inherited goes too, since the poison may have come from there. For anyone else that is a recomputation.
        block: Block | None = cache.tip
        while block is not None and block is not self.store.root:
            parent = block.parent
            for group, page in enumerate(block.pages):
                if page:
                    self.store.forget_page(group, page)
                    self.groups[group].drop(page)
            if slot := block.checkpoint:
                self.store.forget_checkpoint(slot)
                self.slots.units.drop(slot)
            block = parent

    def _promised(self, group: int) -> int:
        """Pages that live sequences were admitted for and have not taken, and one more for each."""
        return sum(1 + self._owed(group, other.promised, other.num_blocks, other.first_live[group]) for other in self._live.values())

    def _owed(self, group: int, total: int, blocks: int, first_live: int) -> int:
        """Pages that a sequence with `blocks` blocks still needs for `total`; a windowed one never holds more than its window."""
        missing = max(total - blocks, 0)
        return missing if self.windows[group] is None else min(missing, max(self._fewest[group] - (blocks - first_live), 0))

    def _capacity_of(self, group: int) -> int:
        pages = self.groups[group].size - 1
        # With the pages of one window and one token a sequence goes on for ever: what it leaves behind comes back.
        return pages * self.page_size if self.windows[group] is None or pages < self._fewest[group] else sys.maxsize
