"""Stop strings in a text that grows, wherever the boundaries between its tokens lie."""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """The text of one answer. `visible` never shrinks and never holds a part of a stop string that may yet be completed.

    With `include`, the stop string itself belongs to the answer.
    """

    def __init__(self, stops: Sequence[str], include: bool):
        self._stops, self._include = stops, include
        self._longest = max(map(len, stops), default=0)
        self._text = ""
        self._visible = 0
        self.stopped_by: str | None = None

    @property
    def visible(self) -> str:
        return self._text[: self._visible]

    def visible_from(self, start: int) -> str:
        """The visible text behind its first `start` characters."""
        return self._text[start : self._visible]

    def add(self, new: str, *, may_stop: bool = True) -> bool:
        """Appends text. True if it completes a stop string, at which the text then ends; nothing may be added afterwards."""
        first = max(len(self._text) - self._longest + 1, self._visible)
        self._text += new
        if not self._stops or not may_stop:
            self._visible = len(self._text)
            return False
        found = [(place, stop) for stop in self._stops if (place := self._text.find(stop, first)) >= 0]
        if found:
            # The first to be complete: so it does not matter how the text was cut into tokens.
            place, self.stopped_by = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._text = self._text[: place + len(self.stopped_by) if self._include else place]
            self._visible = len(self._text)
            return True
        self._visible = max(self._visible, len(self._text) - self._open_end())
        return False

    def close(self) -> None:
        """The answer is over: what was held back is shown."""
        self._visible = len(self._text)

    def _open_end(self) -> int:
        """Characters at the end that a stop string may begin with."""
        end = self._text[-(self._longest - 1) :] if self._longest > 1 else ""
        for start in range(len(end)):
            if any(stop.startswith(end[start:]) for stop in self._stops):
                return len(end) - start
        return 0
