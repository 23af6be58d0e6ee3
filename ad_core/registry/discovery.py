"""Which plugins are installed, read from metadata alone: nothing is imported here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import importlib_metadata
from importlib_metadata import Distribution
from packaging.utils import canonicalize_name

from ad_core.api.types import ENTRY_POINT_GROUP

GROUP_PREFIX = ENTRY_POINT_GROUP.rpartition(".v")[0] + ".v"


@dataclass(frozen=True)
class Found:
    """An entry point of one of our groups. `problem` says what is wrong with the distribution's metadata, if anything is.

    `requires` are the distribution's own requirements (PEP 508). `load` imports the plugin. `given`: it was handed over as
    an object and needs nobody's leave.
    """

    name: str
    distribution: str
    version: str
    value: str
    group: str = ENTRY_POINT_GROUP
    requires: tuple[str, ...] = ()
    problem: str = ""
    given: bool = False
    load: Callable[[], Any] = field(default=lambda: None, compare=False, repr=False)


def scan() -> list[Found]:
    """Every plugin on `sys.path`, by name and then distribution, whatever order the file system gives.

    Of a distribution that is found twice (a link, a leftover of an older install) the first on the path counts, as it
    does for `import`. A plugin that serves several versions of the contract is listed for ours.
    """
    first: dict[str, Distribution] = {}
    for distribution in _distributions():
        if _mentions_us(distribution):
            first.setdefault(_name(distribution), distribution)
    found = [entry for name, distribution in first.items() for entry in _plugins_of(name, distribution)]
    ours = {(entry.name, entry.distribution) for entry in found if entry.group == ENTRY_POINT_GROUP}
    found = [entry for entry in found if entry.group == ENTRY_POINT_GROUP or (entry.name, entry.distribution) not in ours]
    return in_order(found)


def installed_as_source() -> list[tuple[Distribution, Path]]:
    """Distributions of ours and of plugins that are installed editable, with the folder of their source."""
    sources = []
    for distribution in _distributions():
        if not (_mentions_us(distribution) or _name(distribution) == "ad-core"):
            continue
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            sources.append((distribution, Path(unquote(urlsplit(origin["url"]).path))))
    return sources


def in_order(found: Iterable[Found]) -> list[Found]:
    """Sorted, exact repetitions dropped."""
    unique = {(entry.name, entry.distribution, entry.value): entry for entry in found}
    return [unique[key] for key in sorted(unique)]


def _distributions() -> Iterable[Distribution]:
    return cast("Iterable[Distribution]", importlib_metadata.distributions())  # a finder may bring its own class


def _mentions_us(distribution: Distribution) -> bool:
    try:
        return GROUP_PREFIX in (distribution.read_text("entry_points.txt") or "")
    except UnicodeDecodeError:  # not ours: the names of our groups are plain ASCII
        return False


def _name(distribution: Distribution) -> str:
    try:
        return canonicalize_name(distribution.metadata["Name"])
    except Exception:  # no METADATA, or none that can be read; the folder still has a name
        return canonicalize_name(str(getattr(distribution, "_path", "unknown")).rpartition("/")[2].partition("-")[0])


def _plugins_of(name: str, distribution: Distribution) -> Iterable[Found]:
    try:
        version, requires = distribution.version, tuple(distribution.requires or ())
        entries = [entry for entry in distribution.entry_points if entry.group.startswith(GROUP_PREFIX)]
    except Exception as error:  # a file written by a stranger's build tool can be wrong in any way
        return [Found(name, name, "unknown", "", problem=f"its metadata cannot be read: {type(error).__name__}: {error}")]
    return [Found(entry.name, name, version, entry.value, entry.group, requires, load=entry.load) for entry in entries]
