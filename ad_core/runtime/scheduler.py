"""Which tokens of which sequences the next step computes."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from dataclasses import dataclass

from ad_core.api.types import Limits
from ad_core.cache.batch import SAMPLED, Row
from ad_core.cache.manager import CacheManager, SequenceCache
from ad_core.runtime.request import Request, Sequence


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step: its next `num_tokens` tokens. With `samples` they are its last, and a new one is drawn."""

    sequence: Sequence
    num_tokens: int
    samples: bool

    def row(self) -> Row:
        sequence = self.sequence
        assert sequence.cache is not None
        start = sequence.cache.computed
        ids = [SAMPLED] if sequence.sampled_here else sequence.tokens[start : start + self.num_tokens]
        return Row(ids, start, sequence.lane, sequence.cache.pages, sequence.cache.slot, int(self.samples))


@dataclass(frozen=True)
class StepPlan:
    """The work of a step, one-token rows first, and the sequences that it admits."""

    work: list[Work]
    admitted: list[Sequence]


class Scheduler:
    """Continuous batching, first come first served, under the token budget `limits.max_tokens`.

    A step takes first the sequences that decode, then prompts in chunks, then new sequences. When memory runs out the newest
    running sequence is preempted: it gives everything back and is recomputed later. The oldest one is never preempted while
    others run, and alone it fits (the engine refuses what would not), so every sequence gets done.
    """

    def __init__(self, cache: CacheManager, limits: Limits):
        self.cache, self.limits = cache, limits
        self.waiting: deque[Sequence] = deque()
        """New requests, by their first sample."""
        self.returning: list[Sequence] = []
        """Preempted sequences, and further samples of a running request, by age. All are older than those that wait."""
        self.running: list[Sequence] = []
        """By age."""
        self.preemptions = 0
        self._budget = 0
        self._lanes = list(range(1, limits.max_sequences + 1))
        self._stuck: tuple[Sequence, int] | None = None

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.returning or self.waiting)

    def add(self, request: Request) -> None:
        """Queues a request; its further samples follow when the prompt is computed, to share it."""
        self.waiting.append(request.sequences[0])

    def schedule(self) -> StepPlan:
        """Takes pages for the next step and says what it computes."""
        planned: dict[Sequence, int] = {}
        preemptions = self.preemptions
        self._budget = self.limits.max_tokens
        for sequence in sorted(self.running, key=lambda sequence: not sequence.sampled_here):
            if self._budget:
                self._plan(sequence, planned)
        admitted = self._admit(planned) if self.preemptions == preemptions else []
        work = [Work(sequence, count, count == sequence.remaining) for sequence, count in planned.items()]
        work.sort(key=lambda item: item.num_tokens > 1)
        return StepPlan(work, admitted)

    def advance(self, work: Work) -> None:
        """The step has computed the work's tokens."""
        sequence = work.sequence
        assert sequence.cache is not None
        self.cache.commit(sequence.cache, sequence.tokens, sequence.cache.computed + work.num_tokens)
        if work.samples:
            sequence.sampled_here = True
            request = sequence.request
            while request.num_started < request.params.n:
                insort(self.returning, request.sequences[request.num_started], key=lambda other: other.key)
                request.num_started += 1

    def finish(self, sequence: Sequence, *, discard: bool = False) -> None:
        """Takes a sequence out, wherever it is. `discard`: what it computed is not to be reused."""
        if sequence.lane:
            self._leave(sequence, discard=discard)
        elif sequence in self.returning:
            self.returning.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _plan(self, sequence: Sequence, planned: dict[Sequence, int]) -> None:
        """Plans the sequence's next chunk; preempts from the newest on until it has room, itself at worst."""
        while sequence.cache is not None:
            if self._take_chunk(sequence, sequence.cache, planned):
                return
            victim = self.running[-1]
            self._budget += planned.pop(victim, 0)
            self._preempt(victim)

    def _take_chunk(self, sequence: Sequence, cache: SequenceCache, planned: dict[Sequence, int]) -> bool:
        """Takes pages for as many of the sequence's tokens as there is budget and memory for. False if for none."""
        end = min(len(sequence.tokens), cache.computed + self._budget, self.cache.next_boundary(cache.computed))
        if not self.cache.extend(cache, end):
            end = min(end, self.cache.room(cache))
            self.cache.extend(cache, end)
        count = end - cache.computed
        if count < 1:
            return False
        planned[sequence] = count
        self._budget -= count
        return True

    def _admit(self, planned: dict[Sequence, int]) -> list[Sequence]:
        admitted: list[Sequence] = []
        while self._budget and self._lanes and (self.returning or self.waiting):
            sequence = (self.returning or self.waiting)[0]
            if self._stuck == (sequence, self.cache.releases):
                break
            request = sequence.request
            expected = len(request.prompt_ids) + (request.params.max_tokens or 0)
            donor = None if sequence.index == 0 or sequence.num_sampled else request.sequences[0].cache
            cache = self.cache.admit(sequence.tokens, expected=expected, donor=donor)
            if cache is None:
                self._stuck = (sequence, self.cache.releases)
                break
            if self.returning:
                self.returning.pop(0)
            else:
                self.waiting.popleft()
            sequence.begin(heapq.heappop(self._lanes), cache)
            insort(self.running, sequence, key=lambda other: other.key)
            self._take_chunk(sequence, cache, planned)
            admitted.append(sequence)
        return admitted

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        insort(self.returning, sequence, key=lambda other: other.key)
        sequence.request.preemptions += 1
        self.preemptions += 1

    def _leave(self, sequence: Sequence, *, discard: bool = False) -> None:
        assert sequence.cache is not None
        self.running.remove(sequence)
        self.cache.release(sequence.cache, discard=discard)
        heapq.heappush(self._lanes, sequence.lane)
        sequence.lane, sequence.cache, sequence.sampled_here = 0, None, False
