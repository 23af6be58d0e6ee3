"""Tensors of a checkpoint that become slices of one of the module's are read one at a time into their places.

transformers' own operations collect all of them, stack them, and then join the stacks: twice the memory of what is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch


class Stored(Protocol):
    """A tensor that has not been read."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, in `dtype`."""
        ...


_STACK, _JOIN = ("MergeModulelist", 0), ("Concatenate", 1)
"""The operations that are understood: one tensor for each part of a list, stacked; and several such stacks, side by side."""


def stacked(transform: Any, sources: Sequence[tuple[str, str, Stored]], slot: torch.Tensor) -> torch.Tensor | None:
    """What `transform` makes of its sources (pattern that matched, name, tensor) for `slot`, with no more memory than that and one source.

    None where it is another kind of transform or the sources do not fit the slot: transformers' own operations then do it, or say why not.
    """
    places = _places(transform, sources, tuple(slot.shape))
    if places is None:
        return None
    floating = slot.dtype.is_floating_point
    result = torch.empty(slot.shape, dtype=slot.dtype if floating else sources[0][2].dtype)
    for index, rows, stored in places:
        result[index, rows] = stored.read(slot.dtype if floating and stored.dtype.is_floating_point else None)
    return result


def _places(transform: Any, sources: Sequence[tuple[str, str, Stored]], shape: tuple[int, ...]) -> list[tuple[int, slice, Stored]] | None:
    """Where each source goes: its index in the stack, and its rows there."""
    chain = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in transform.operations]
    if chain not in ([_STACK], [_STACK, _JOIN]) or len(transform.target_patterns) != 1:
        return None
    by_pattern: dict[str, list[Stored]] = {}
    for pattern, _, stored in sources:
        by_pattern.setdefault(pattern, []).append(stored)
    if len(chain) == 1 and len(by_pattern) != 1:
        return None
    ordered = [by_pattern[pattern] for pattern in transform.source_patterns if pattern in by_pattern]
    if len(ordered) != len(by_pattern) or not all(_alike(stack) and len(stack) == shape[0] for stack in ordered):
        return None
    heights = [stack[0].shape[0] for stack in ordered]
    if len(shape) < 2 or sum(heights) != shape[1] or any(tuple(stack[0].shape[1:]) != shape[2:] for stack in ordered):
        return None
    return list(_laid_out(ordered, heights))


def _laid_out(stacks: Sequence[Sequence[Stored]], heights: Sequence[int]) -> Iterator[tuple[int, slice, Stored]]:
    top = 0
    for stack, height in zip(stacks, heights, strict=True):
        for index, stored in enumerate(stack):
            yield index, slice(top, top + height), stored
        top += height


def _alike(stack: Sequence[Stored]) -> bool:
    return len({(tuple(stored.shape), stored.dtype) for stored in stack}) == 1
