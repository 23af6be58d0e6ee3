"""What the registry knows of a plugin, and what a plugin offers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

from ad_core.api.errors import PluginBrokenError, PluginConflictError, PluginError, PluginIncompatibleError
from ad_core.api.types import PluginInfo

Item = TypeVar("Item")


class State(StrEnum):
    """How far loading a plugin went. Only a loaded one is ever asked for anything."""

    LOADED = "loaded"
    BLOCKED = "blocked"
    """The user does not want it; it was not even imported."""
    INCOMPATIBLE = "incompatible"
    """Written for another version of the core or of the contract."""
    CONFLICT = "conflict"
    """Another distribution claims the same name; both are refused."""
    BROKEN = "broken"
    """It raised, or breaks the contract."""


_ERRORS: dict[State, type[PluginError]] = {
    State.BLOCKED: PluginError,
    State.INCOMPATIBLE: PluginIncompatibleError,
    State.CONFLICT: PluginConflictError,
    State.BROKEN: PluginBrokenError,
}


@dataclass(frozen=True)
class PluginRecord:
    """One plugin: where it comes from, its state, and if it is not loaded why (`reason`) and what to do (`fix`).

    `value` is what the entry point names, `module` the imported object. `traceback` is kept for `ad doctor`.
    """

    name: str
    distribution: str
    version: str
    value: str
    state: State
    reason: str = ""
    fix: str = ""
    info: PluginInfo | None = None
    hooks: tuple[str, ...] = ()
    traceback: str = field(default="", repr=False, compare=False)
    module: Any = field(default=None, repr=False, compare=False)
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def line(self) -> str:
        """One line for the terminal."""
        return f"plugin {self.name!r} ({self.distribution} {self.version}) is {self.state}: {self.reason}; {self.fix}"

    def to_error(self) -> PluginError:
        """The error to raise when this plugin is needed, or whenever the registry is strict."""
        return _ERRORS[self.state](
            f"the plugin {self.name!r} cannot be used: it is {self.state}",
            where=f"{self.distribution} {self.version} ({self.value})",
            why=self.reason,
            hint=self.fix,
        )


@dataclass(frozen=True)
class Offer(Generic[Item]):
    """An object together with the plugin and distribution that it comes from."""

    item: Item
    plugin: str
    distribution: str


def pip_install(*requirements: str) -> str:
    """The line that installs into the interpreter that is running, whichever `pip` the shell would find."""
    quoted = [f"'{text}'" if set(text) & set("<>=!~[; ") else text for text in requirements]
    return f"{sys.executable} -m pip install -U {' '.join(quoted)}"
