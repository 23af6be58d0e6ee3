"""A compiled, cached model as the runtime sees it: rows in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ad_core.cache.batch import Batch, BatchBuilder, GroupView, Row
from ad_core.cache.budget import PoolSizes
from ad_core.cache.layout import BufferInput, CacheLayout, FieldInput, IdsInput, PoolInput
from ad_core.cache.pools import Pools


class CachedModel:
    """Runs steps of the compiled graph `call` over pools that it owns.

    `last_ids` [max_sequences + 1] is indexed by lane; whoever samples writes it, and the next step reads it on the device.
    """

    def __init__(self, call: Callable[..., Any], layout: CacheLayout, sizes: PoolSizes, vocab_size: int, device: torch.device):
        self.spec, self.limits, self.sizes = layout.spec(), layout.limits, sizes
        self.vocab_size, self.device = vocab_size, device
        self.pools = Pools(layout, sizes.num_pages, sizes.num_slots, device)
        self._call, self._layout = call, layout
        self._builder = BatchBuilder(layout.limits, len(layout.windows), device)
        self.last_ids = self._builder.last_ids

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [R, V] of the rows' wanted tokens, in order. Appends the rows' tokens to the pools. Decodes come first."""
        batch = self._builder.build(rows)
        for preparation, buffers in zip(self._layout.preparations, self.pools.buffers, strict=True):
            preparation.kernel.prepare(GroupView(batch, preparation.group), preparation.call, buffers)
        logits: torch.Tensor = self._call(*self._values(batch))
        return logits

    def copy_slot(self, source: int, target: int) -> None:
        """Copies a sequence's states, to take or to restore a checkpoint."""
        for pool in self._layout.pools:
            if pool.group < 0:
                tensor = self.pools.tensors[pool.name]
                tensor[target].copy_(tensor[source])

    def copy_page(self, group: int, source: int, target: int) -> None:
        """Copies one page of every pool of a group, so that two sequences can go on from a shared, partly filled page."""
        for pool in self._layout.pools:
            if pool.group == group:
                tensor = self.pools.tensors[pool.name]
                tensor[target].copy_(tensor[source])

    def _values(self, batch: Batch) -> list[torch.Tensor]:
        """The placeholders' values in order."""
        values = []
        for entry in self._layout.inputs:
            match entry:
                case FieldInput(name, group):
                    values.append(batch.device_field(name, group))
                case PoolInput(name):
                    values.append(self.pools.tensors[name])
                case BufferInput():
                    values.append(self.pools.buffer(entry))
                case IdsInput():
                    values.append(self._builder.input_ids(batch))
        return values
