"""How much of a prompt is already in the cache: the minimum over all page groups and states, with the reason for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reuse:
    """Tokens of a prompt that are not computed again, and why not more."""

    length: int
    reason: str


class Content(Protocol):
    """Where one page's worth of tokens lies: a page of every group, 0 where it is gone, and a checkpoint or 0."""

    @property
    def pages(self) -> Sequence[int]: ...

    @property
    def checkpoint(self) -> int: ...


def first_live_block(num_tokens: int, window: int | None, page_size: int) -> int:
    """The first block that a query at position `num_tokens` or later may still read: key j is seen if j > i - window."""
    return 0 if window is None else max(0, num_tokens - window + 1) // page_size


def reusable_blocks(chain: Sequence[Content], windows: Sequence[int | None], page_size: int, *, states: bool) -> tuple[int, str]:
    """The most blocks of `chain` behind which every mixer can go on, and what prevents one more ("" if nothing does).

    An unwindowed group needs all pages before that point, a windowed one those that its window still reaches, and a state
    needs a checkpoint exactly there. So with states only the points with a checkpoint count: what prevents the next of those is the
    reason, and if there is none, that.
    """
    best, obstacle = 0, ""
    last_gone = [-1] * len(windows)
    for index, content in enumerate(chain):
        length, obstacle_here = index + 1, ""
        for group, window in enumerate(windows):
            if not content.pages[group]:
                last_gone[group] = index
            if last_gone[group] >= first_live_block(length * page_size, window, page_size):
                kind = "attention" if window is None else f"window-{window} attention"
                obstacle_here = f"pages of {kind} were evicted"
        if states and not content.checkpoint:
            continue
        if obstacle_here:
            obstacle = obstacle or obstacle_here
        else:
            best, obstacle = length, ""
    if states and not obstacle and best < len(chain):
        obstacle = "no state was saved further on"
    return best, obstacle
