"""Pools and kernel buffers: allocated once, at fixed addresses for the engine's life."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ad_core.api.resources import PagedTokens
from ad_core.cache.layout import BufferInput, CacheLayout


class Pools:
    """The memory of one engine. Pages and slots number 0 are null: padded tokens are written there and nobody reads them.

    Pools are written once when they are made, so that what the ledger prints is resident and a later step cannot run out.
    """

    def __init__(self, layout: CacheLayout, num_pages: Sequence[int], num_slots: int, device: torch.device):
        page_size = layout.limits.page_size
        self.tensors: dict[str, torch.Tensor] = {}
        for pool in layout.pools:
            resource = pool.resource
            if isinstance(resource, PagedTokens):
                shape = (num_pages[pool.group], resource.entries(page_size), *resource.per_token)
            else:
                shape = (num_slots, *resource.shape)
            self.tensors[pool.name] = torch.empty(shape, dtype=resource.dtype, device=device).zero_()
        self.buffers: list[dict[str, torch.Tensor]] = [
            {
                name: torch.empty(spec.shape, dtype=spec.dtype, device="cpu" if spec.device == "host" else device).zero_()
                for name, spec in p.buffers.items()
            }
            for p in layout.preparations
        ]

    def buffer(self, entry: BufferInput) -> torch.Tensor:
        """The kernel's own tensor that a placeholder stands for."""
        return self.buffers[entry.preparation][entry.name]

    @property
    def pool_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def buffer_bytes(self) -> int:
        return sum(tensor.nbytes for buffers in self.buffers for tensor in buffers.values())
