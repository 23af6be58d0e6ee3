"""A tiny deterministic model over real paged memory, and what it must answer, computed without any of that.

Its logits are a row of a random table, chosen by exact integer hashes of the ids that it finds in its pools: one over all
tokens (an unwindowed page group), one over the last few (a windowed group), one folded token by token (a state slot). A page
that is missing, stale, swapped or overwritten chooses another row. Pools start as poison, and reading poison raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ad_core.api.types import Limits
from ad_core.cache.batch import BatchBuilder, Row
from ad_core.cache.spec import CacheSpec, PageGroupSpec
from ad_core.runtime.engine import Engine
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.sampler import Sampler

POISON = -(10**9)
PRIME = 1_000_003


class ToyExecutor:
    """An `Executor`. `windows` are its page groups, `states` gives it a slot a sequence."""

    def __init__(
        self,
        *,
        windows: Sequence[int | None] = (None,),
        states: bool = False,
        page_size: int = 4,
        num_pages: int | Sequence[int] = 64,
        num_slots: int = 16,
        max_tokens: int = 16,
        max_sequences: int = 4,
        max_model_len: int = 128,
        vocab_size: int = 32,
    ):
        self.windows = tuple(windows)
        self.num_pages = [num_pages] * len(windows) if isinstance(num_pages, int) else list(num_pages)
        self.num_slots = num_slots if states else 0
        self.spec = CacheSpec(page_size, tuple(PageGroupSpec(window, 8 * page_size) for window in windows), 8 if states else 0)
        self.limits = Limits(max_tokens, max_sequences, max_model_len, page_size)
        self.vocab_size = vocab_size
        self.pools = [torch.full((pages, page_size), POISON) for pages in self.num_pages]
        self.slots = torch.full((max(self.num_slots, 1),), POISON)
        self._builder = BatchBuilder(self.limits, len(self.windows), torch.device("cpu"))
        self.last_ids = self._builder.last_ids
        self.table = 3 * torch.randn(997, vocab_size, generator=torch.Generator().manual_seed(7))
        self.steps: list[list[int]] = []
        """The rows' lengths of every step."""

    def engine(self, **options: object) -> Engine:
        return Engine(self, self.num_pages, self.num_slots, **options)  # type: ignore[arg-type]

    # -- through the pools ------------------------------------------------------------------------------------------------

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        batch = self._builder.build(rows)
        assert batch.num_tokens <= self.limits.max_tokens
        assert len(rows) <= self.limits.max_sequences
        assert len({row.lane for row in rows}) == len(rows)
        lengths = [len(row.token_ids) for row in rows]
        assert lengths == sorted(lengths, key=lambda length: length > 1)
        self.steps.append(lengths)
        ids = self._builder.input_ids(batch)[0]
        size = self.spec.page_size
        for group, pool in enumerate(self.pools):
            slots = batch.device_field("token_slots", group).long()
            assert (slots >= size).all(), "a token would be written to the null page"
            pool.view(-1)[slots] = ids
        logits = []
        for index, row in enumerate(rows):
            start, end = batch.device_field("cu_seqlens")[index : index + 2].tolist()
            state = int(self.slots[row.slot]) if self.num_slots and row.context_len else 0
            for place in range(start, end):
                position = row.context_len + place - start
                if self.num_slots:
                    assert row.slot > 0
                    assert state >= 0, "a poisoned state was read"
                    state = fold(state, int(ids[place]))
                if end - place <= row.num_outputs:
                    seen = [self._read(batch.device_field("page_table", g)[index], g, position) for g in range(len(self.windows))]
                    logits.append(self._logits(seen, position, state))
            if self.num_slots:
                self.slots[row.slot] = state
        return torch.stack(logits) if logits else torch.empty(0, self.vocab_size)

    def copy_slot(self, source: int, target: int) -> None:
        assert source > 0
        assert target > 0
        self.slots[target] = self.slots[source]

    def _read(self, pages: torch.Tensor, group: int, position: int) -> list[int]:
        size, window = self.spec.page_size, self.windows[group]
        first = 0 if window is None else max(0, position - window + 1)
        seen = []
        for j in range(first, position + 1):
            page = int(pages[j // size])
            assert page > 0, "a page that the window still reaches was given back"
            seen.append(int(self.pools[group][page, j % size]))
        assert min(seen) >= 0, "poison was read"
        return seen

    def poison_free(self, engine: Engine) -> None:
        """Overwrites what nobody holds and nobody can find."""
        for pool, allocator in zip(self.pools, engine.cache.groups, strict=True):
            pool[allocator.free_units()] = POISON
            pool[0] = POISON
        self.slots[[0, *engine.cache.slots.units.free_units()]] = POISON

    # -- without pools ----------------------------------------------------------------------------------------------------

    def logits_of(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [V] behind `ids`, from the ids alone."""
        position, state = len(ids) - 1, 0
        for index in ids:
            state = fold(state, index)
        seen = [list(ids) if window is None else list(ids[max(0, len(ids) - window) :]) for window in self.windows]
        return self._logits(seen, position, state if self.num_slots else 0)

    def _logits(self, seen: list[list[int]], position: int, state: int) -> torch.Tensor:
        total = state
        for group, ids in enumerate(seen):
            first = position + 1 - len(ids)
            total += (group + 2) * sum((index + 1) * (3 * (first + place) + 7) ** 2 for place, index in enumerate(ids))
        return self.table[total % PRIME % len(self.table)]


def fold(state: int, index: int) -> int:
    return (5 * state + index + 1) % PRIME


def reference(
    model: ToyExecutor, prompt: Sequence[int], params: SamplingParams, *, sample: int = 0, eos: Sequence[int] = (), max_length: int
) -> list[int]:
    """What the engine must answer: one sequence, alone, recomputed from its ids at every token."""
    sampler = Sampler(1, model.vocab_size, torch.device("cpu"))
    stop_ids = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos)})
    tokens = list(prompt)
    sampler.add(1, params, seed=params.seed or 0, sample=sample, tokens=tokens, prompt_len=len(prompt), stop_ids=stop_ids)
    while len(tokens) < max_length and len(tokens) - len(prompt) != params.max_tokens:
        tokens.append(sampler.sample(model.logits_of(tokens)[None], [1], [len(tokens)]).ids_on_host()[0])
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def drain(engine: Engine, model: ToyExecutor | None = None) -> dict[str, object]:
    """Steps until nothing is left, audits after each step, and returns the finished outputs by request."""
    done = {}
    while engine.has_work:
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
        engine.cache.audit()
        if model is not None:
            model.poison_free(engine)
    return done


class Letters:
    """A tokenizer of one letter a token: 0 is "a", 1 is "b"; 31 is special."""

    class Special:
        special = True

    all_special_ids = (31,)
    added_tokens_decoder = {31: Special()}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join("<end>" if index == 31 else chr(97 + index) for index in ids)


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + index) for index in ids)
