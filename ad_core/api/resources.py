"""What a mixer keeps between steps. There are only these two physical kinds; names and shapes are open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PagedTokens:
    """Memory that grows by token: a pool `[num_pages, page_size, *per_token]`.

    `window`: tokens further back than this are never read again, so their pages may be freed. None reads all.

    `every`: one entry stands for so many tokens, for a mixer that sums them up. The pool is `[num_pages, entries(page_size), *per_token]`,
    and the entry of tokens w * every to (w + 1) * every - 1 lies in the page of the last of them, at its offset // every.
    """

    per_token: tuple[int, ...]
    dtype: torch.dtype
    window: int | None = None
    every: int = 1

    def entries(self, page_size: int) -> int:
        """Entries of one page."""
        return -(-page_size // self.every)


@dataclass(frozen=True)
class SlotState:
    """Memory of a fixed size a sequence: a pool `[num_slots, *shape]`, read as zero when a sequence is `fresh`.

    `checkpoint`: a copy taken at a token boundary restores the state there, so prefixes can be reused.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    checkpoint: bool = True
    rollback: Literal["none", "snapshot"] = "none"


Resource = PagedTokens | SlotState


@dataclass(frozen=True)
class BufferSpec:
    """A kernel's own tensor: allocated once at the engine's start, at a fixed address, filled by `Kernel.prepare`.

    `device` "host" keeps it in CPU memory whatever the model's device is.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: Literal["model", "host"] = "model"
