"""A canonical graph becomes a cached model: limits, kernels, insertion's result, pools, and what a step really takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ad_core.api.types import Limits
from ad_core.cache.batch import Row
from ad_core.cache.budget import PoolSizes, sizes_for
from ad_core.cache.layout import CacheLayout
from ad_core.cache.memory import available_bytes, peak_of
from ad_core.cache.model import CachedModel

SHARE_OF_FREE = {"cpu": 0.25, "cuda": 0.85}
"""Of the memory that is free when weights are loaded, what pools may take if nobody says."""
CPU_DEFAULT = 1 << 30
"""And on a CPU no more than this: the machine is rarely ours alone, and pools are written once at the start."""


def default_memory(device: torch.device) -> int:
    """Bytes for the pools when the user names none."""
    share = int(available_bytes(device) * SHARE_OF_FREE.get(device.type, 0.5))
    return min(share, CPU_DEFAULT) if device.type == "cpu" else share


def build_model(
    call: Callable[..., Any],
    layout: CacheLayout,
    *,
    memory: int | None,
    vocab_size: int,
    device: torch.device,
    checkpoint_interval: int | None = None,
) -> CachedModel:
    """Pools of `memory` bytes (or the default) under the compiled graph, with room for a saved state every `checkpoint_interval`
    tokens (None: states are not saved). Raises `OutOfMemoryBudgetError`."""
    sizes = sizes_for(layout.spec(), layout.limits, default_memory(device) if memory is None else memory, checkpoint_interval)
    return CachedModel(call, layout, sizes, vocab_size, device)


def measure_workspace(model: CachedModel) -> int | None:
    """Bytes that the largest step takes beside weights and pools: one is run, on pages that nobody owns yet.

    None where the system does not tell. The entries it leaves behind are overwritten before anybody reads them.
    """
    rows = _largest_step(model.limits, model.sizes)
    return peak_of(lambda: model.step(rows), model.device)


def _largest_step(limits: Limits, sizes: PoolSizes) -> list[Row]:
    """One sequence of as many tokens as a step, the model and the pools allow, with as many logits as sequences could want."""
    room = [(pages - 1) * limits.page_size for pages in sizes.num_pages]
    tokens = min(limits.max_tokens, limits.max_model_len, *room)
    blocks = -(-tokens // limits.page_size)
    pages = tuple(range(1, blocks + 1) for _ in sizes.num_pages)
    return [Row([0] * tokens, 0, lane=1, pages=pages, slot=min(1, sizes.num_slots), num_outputs=min(tokens, limits.max_sequences))]
