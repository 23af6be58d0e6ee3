"""Which plugins the user wants: arguments and environment together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.utils import canonicalize_name

from ad_core.registry.discovery import Found

ALLOW, DENY, STRICT = "AD_PLUGINS", "AD_DISABLE_PLUGINS", "AD_STRICT"


@dataclass(frozen=True)
class Controls:
    """Names of plugins or distributions. Each of `allows` must allow a plugin (an empty one allows none), `deny` wins."""

    allows: tuple[frozenset[str], ...] = ()
    deny: frozenset[str] = frozenset()
    strict: bool = False

    @classmethod
    def read(cls, allow: Iterable[str] | None = None, deny: Iterable[str] | None = None, strict: bool | None = None) -> Controls:
        """The arguments, narrowed further by `AD_PLUGINS`, `AD_DISABLE_PLUGINS` and `AD_STRICT`."""
        environment = os.environ.get(ALLOW)
        lists = [_names(allow)] if allow is not None else []
        lists += [_names(environment.split(","))] if environment is not None else []
        denied = _names(deny or ()) | _names(os.environ.get(DENY, "").split(","))
        if strict is None:
            strict = os.environ.get(STRICT, "").lower() in {"1", "true", "yes", "on"}
        return cls(tuple(lists), denied, strict)

    def verdict(self, found: Found) -> tuple[str, str]:
        """Why a plugin is blocked and what would unblock it; two empty strings if it is not."""
        names = _names((found.name, found.distribution))
        if names & self.deny:
            return "it is denied", f"take it out of {DENY} or of the denied plugins"
        if not found.given and any(not names & allowed for allowed in self.allows):
            return "it is not among the allowed plugins", f"add it to {ALLOW} or to the allowed plugins"
        return "", ""

    def unknown(self, found: Iterable[Found]) -> list[str]:
        """Allowed names that no installed plugin has."""
        installed = {name for entry in found for name in _names((entry.name, entry.distribution))}
        return sorted({name for allowed in self.allows for name in allowed} - installed)


def _names(words: Iterable[str]) -> frozenset[str]:
    return frozenset(canonicalize_name(word.strip()) for word in words if word.strip())
