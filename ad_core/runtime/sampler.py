"""From logits to ids, for a whole batch at once, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ad_core.runtime.filters import argmax, draw, draw_filtered
from ad_core.runtime.noise import position_keys, stream_key
from ad_core.runtime.params import SamplingParams
from ad_core.runtime.penalties import Penalties

IN_CACHE = 1 << 16
"""Logits that a CPU works on at once."""


@dataclass(frozen=True)
class _Lane:
    params: SamplingParams
    stream: int
    banned: torch.Tensor | None
    """Ids that may not be sampled before `banned_until` tokens."""
    banned_until: int


@dataclass(frozen=True)
class Sampled:
    """What one step drew. `ids` [R] and `failed` [R] lie on the device; the other methods wait for it."""

    ids: torch.Tensor
    failed: torch.Tensor
    """The row's logits were not numbers: its id means nothing."""
    logprobs: dict[int, tuple[int, torch.Tensor, torch.Tensor]]
    """By row, if it asked: how many are wanted, and ids and log-probabilities with the chosen one first."""

    def ids_on_host(self) -> list[int]:
        """The ids, -1 for a failed row. One transfer."""
        ids: list[int] = self.ids.masked_fill(self.failed, -1).tolist()
        return ids

    def logprobs_on_host(self, row: int) -> dict[int, float] | None:
        """Log-probabilities by token id, the chosen token first, then the most likely ones; None if not asked for."""
        if row not in self.logprobs:
            return None
        wanted, ids, values = self.logprobs[row]
        return dict(zip(ids[: wanted + 1].tolist(), values[: wanted + 1].tolist(), strict=True))


class Sampler:
    """Samples for lanes. `add` tells it of a lane's new sequence; `sample` needs only to be told which lanes are in a step.

    A row's result is a function of its own logits, parameters, seed and position: never of the other rows.
    """

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._lanes: dict[int, _Lane] = {}
        self._special: set[int] = set()
        self._penalties = Penalties(vocab_size, device)
        self._knobs = torch.zeros((max_sequences + 1, 4), dtype=torch.float32, device=device)

    def add(
        self, lane: int, params: SamplingParams, *, seed: int, sample: int, tokens: Sequence[int], prompt_len: int, stop_ids: Sequence[int]
    ) -> None:
        """A sequence takes the lane from whoever had it. `tokens` are its prompt and what was sampled before a
        preemption; `stop_ids` end it."""
        self._special.discard(lane)
        self._penalties.remove(lane)
        bans = params.min_tokens > 0 and len(stop_ids) > 0
        banned = torch.tensor(stop_ids, device=self._device) if bans else None
        self._lanes[lane] = _Lane(params, stream_key(seed, sample), banned, prompt_len + params.min_tokens if bans else 0)
        if not params.is_greedy or params.has_penalties or bans or params.logprobs is not None:
            self._special.add(lane)
            knobs = [params.temperature, min(params.top_k, self._vocab_size), params.top_p, params.min_p]
            self._knobs[lane] = torch.tensor(knobs, device=self._device)
        if params.has_penalties:
            self._penalties.add(lane, params, tokens[:prompt_len], tokens[prompt_len:])

    def sample(self, logits: torch.Tensor, lanes: Sequence[int], lengths: Sequence[int]) -> Sampled:
        """The next token of every row of `logits` [R, V], which are not changed. `lengths` [R] counts each sequence's tokens."""
        # On a CPU a few rows at a time: their temporaries stay in its caches; a whole batch's cost more in page faults than
        # in work. Greedy rows need none.
        few = max(1, IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(lanes)
        size = len(lanes) if self._special.isdisjoint(lanes) else few
        if size == len(lanes):
            return self._sample(logits, lanes, lengths)
        ends = range(0, len(lanes), size)
        parts = [self._sample(logits[at : at + size], lanes[at : at + size], lengths[at : at + size]) for at in ends]
        logprobs = {at + row: entry for at, part in zip(ends, parts, strict=True) for row, entry in part.logprobs.items()}
        return Sampled(torch.cat([part.ids for part in parts]), torch.cat([part.failed for part in parts]), logprobs)

    def _sample(self, logits: torch.Tensor, lanes: Sequence[int], lengths: Sequence[int]) -> Sampled:
        ids = argmax(logits)
        failed = ~logits.gather(1, ids[:, None])[:, 0].isfinite()
        if self._special.isdisjoint(lanes):
            return Sampled(ids, failed, {})
        work = logits.to(torch.float32, copy=True)
        raw = work.clone() if any(self._lanes[lane].params.logprobs is not None for lane in lanes) else work
        penalised = self._penalties.apply(work, lanes)
        if self._ban(work, lanes, lengths) or penalised:
            ids = argmax(work)
            failed |= ~work.gather(1, ids[:, None])[:, 0].isfinite()
        self._draw(work, ids, lanes, lengths)
        self._penalties.count(lanes, ids)
        return Sampled(ids, failed, self._logprobs(raw, ids, lanes))

    def _ban(self, work: torch.Tensor, lanes: Sequence[int], lengths: Sequence[int]) -> bool:
        any_banned = False
        for row, (lane, length) in enumerate(zip(lanes, lengths, strict=True)):
            banned = self._lanes[lane].banned
            if banned is not None and length < self._lanes[lane].banned_until:
                work[row, banned] = -torch.inf
                any_banned = True
        return any_banned

    def _draw(self, work: torch.Tensor, ids: torch.Tensor, lanes: Sequence[int], lengths: Sequence[int]) -> None:
        """Writes the ids of rows that are not greedy. Rows with and without filters are drawn apart: filters cost a sort."""
        plain: list[int] = []
        filtered: list[int] = []
        for row, lane in enumerate(lanes):
            params = self._lanes[lane].params
            if not params.is_greedy:
                (filtered if params.top_k or params.top_p < 1.0 or params.min_p else plain).append(row)
        for rows in (plain, filtered):
            if not rows:
                continue
            index = torch.tensor([[row, lanes[row]] for row in rows], device=self._device)
            knobs = self._knobs[index[:, 1]]
            streams = [self._lanes[lanes[row]].stream for row in rows]
            keys = position_keys(streams, [lengths[row] for row in rows], self._device)
            logits = work[index[:, 0]]
            logits = (logits - logits.amax(1, keepdim=True)).div_(knobs[:, :1])
            choice = draw(logits, keys) if rows is plain else draw_filtered(logits, keys, knobs[:, 1].long(), knobs[:, 2], knobs[:, 3])
            ids[index[:, 0]] = choice

    def _logprobs(self, raw: torch.Tensor, ids: torch.Tensor, lanes: Sequence[int]) -> dict[int, tuple[int, torch.Tensor, torch.Tensor]]:
        asked = {row: n for row, lane in enumerate(lanes) if (n := self._lanes[lane].params.logprobs) is not None}
        if not asked:
            return {}
        index = torch.tensor(list(asked), device=self._device)
        logprobs = raw[index].log_softmax(1)
        chosen = ids[index, None]
        values, top = logprobs.topk(min(max(asked.values()), self._vocab_size), dim=1)
        both = torch.cat([chosen, top], 1), torch.cat([logprobs.gather(1, chosen), values], 1)
        return {row: (n, both[0][place], both[1][place]) for place, (row, n) in enumerate(asked.items())}
