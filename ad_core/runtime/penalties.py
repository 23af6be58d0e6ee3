"""Repetition, presence and frequency penalties from counts that stay on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ad_core.runtime.params import SamplingParams


class Penalties:
    """Token counts of the lanes that asked for penalties: V * 5 bytes a lane, allocated when one does.

    `add` and `remove` follow a lane's sequence, `apply` changes logits in place, `count` notes what was sampled.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self._vocab_size, self._device = vocab_size, device
        self._rows: dict[int, int] = {}
        self._spare: list[int] = []
        self._in_answer = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._knobs = torch.zeros((0, 3), dtype=torch.float32, device=device)

    def add(self, lane: int, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Starts counting for a lane; `answer` is what was sampled before a preemption."""
        if not self._spare:
            self._grow()
        row = self._rows[lane] = self._spare.pop()
        self._in_prompt[row] = False
        self._in_prompt[row, self._ids(prompt)] = True
        self._in_answer[row] = torch.bincount(self._ids(answer), minlength=self._vocab_size)
        knobs = [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        self._knobs[row] = torch.tensor(knobs, device=self._device)

    def remove(self, lane: int) -> None:
        if lane in self._rows:
            self._spare.append(self._rows.pop(lane))

    def apply(self, logits: torch.Tensor, lanes: Sequence[int]) -> bool:
        """Changes the float32 `logits` [R, V] of the lanes that have penalties. False if none has."""
        places, rows = self._select(lanes)
        if places is None:
            return False
        counts, knobs = self._in_answer[rows], self._knobs[rows]
        repetition, presence, frequency = knobs[:, :1], knobs[:, 1:2], knobs[:, 2:]
        answered = counts > 0
        chosen = logits[places]
        repeated = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(answered | self._in_prompt[rows], repeated, chosen)
        logits[places] = chosen - presence * answered - frequency * counts
        return True

    def count(self, lanes: Sequence[int], ids: torch.Tensor) -> None:
        """Notes the sampled `ids` [R] for the lanes that have penalties. Nothing is read back."""
        places, rows = self._select(lanes)
        if places is not None:
            self._in_answer.index_put_((rows, ids[places]), torch.ones_like(rows, dtype=torch.int32), accumulate=True)

    def _select(self, lanes: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        pairs = [(place, self._rows[lane]) for place, lane in enumerate(lanes) if lane in self._rows]
        if not pairs:
            return None, self._ids([])
        places, rows = torch.tensor(pairs, device=self._device).unbind(1)
        return places, rows

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._device)

    def _grow(self) -> None:
        old = len(self._knobs)
        added = max(old, 1)
        self._spare.extend(reversed(range(old, old + added)))
        self._in_answer, self._in_prompt, self._knobs = (
            torch.cat([table, torch.zeros((added, *table.shape[1:]), dtype=table.dtype, device=self._device)])
            for table in (self._in_answer, self._in_prompt, self._knobs)
        )
