"""What the runtime knows of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ad_core.api.types import Limits
from ad_core.cache.batch import Row
from ad_core.cache.spec import CacheSpec


class Executor(Protocol):
    """A compiled model over pools of its own, in this process or spread over several."""

    @property
    def spec(self) -> CacheSpec: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def last_ids(self) -> torch.Tensor:
        """[max_sequences + 1] int64 on the model's device, by lane: the sampler writes `last_ids[lanes] = ids`, and a row
        with `token_ids=[SAMPLED]` reads it."""
        ...

    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Appends the rows' tokens to the pools; logits [R, V] of the wanted tokens on the model's device.

        R is the sum of `num_outputs`. Rows of one token come first. The logits are valid until the next step and may be
        of any floating dtype. With R 0 nothing is looked at.
        """
        ...

    def copy_slot(self, source: int, target: int) -> None:
        """Copies a sequence's states, ordered with the steps."""
        ...
