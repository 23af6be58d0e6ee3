"""What to install: from a generated list of known plugins. A name that is not in it is never suggested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ad_core.registry.records import State, pip_install
from ad_core.registry.registry import Registry


@dataclass(frozen=True)
class KnownPlugin:
    """An entry of the index. `available`: its distribution can be installed today; otherwise it is only planned."""

    name: str
    distribution: str
    available: bool
    summary: str
    op_namespaces: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ()
    """Endings of checkpoint files that it opens."""


@cache
def known_plugins() -> tuple[KnownPlugin, ...]:
    """The index, by plugin name."""
    text = resources.files("ad_core.registry").joinpath("known_plugins.json").read_text(encoding="utf-8")
    return tuple(_entry(name, fields) for name, fields in sorted(json.loads(text)["plugins"].items()))


def providers(*, op: str | None = None, model_type: str | None = None, suffix: str | None = None) -> tuple[KnownPlugin, ...]:
    """The known plugins that a model needs for this op ("namespace::name"), this `model_type`, or this file ending."""

    def provides(plugin: KnownPlugin) -> bool:
        by_op = op is not None and (op in plugin.ops or op.partition("::")[0] in plugin.op_namespaces)
        return by_op or model_type in plugin.model_types or (suffix or "").lower() in plugin.suffixes

    return tuple(plugin for plugin in known_plugins() if provides(plugin))


def install_hint(
    registry: Registry | None = None, *, op: str | None = None, model_type: str | None = None, suffix: str | None = None
) -> str:
    """What to do so that a plugin provides this: install it, or mend the one that is installed and not usable.

    For the `hint` of an error. `registry` tells what is installed already.
    """
    known = providers(op=op, model_type=model_type, suffix=suffix)
    steps = [step for plugin in known if (step := _step(plugin, registry))]
    if steps:
        return "; ".join(steps)
    if known:
        names = " and ".join(plugin.distribution for plugin in known)
        return f"what provides it is installed and loaded ({names}); this model does it in a way that is new: please report it"
    unusable = [record for record in registry.plugins if record.state is not State.LOADED] if registry else []
    if unusable:
        return "no known plugin provides it; perhaps one that is installed would: " + "; ".join(record.line for record in unusable)
    return "no known plugin provides it; a plugin of yours can (CONTRIBUTING.md says how), and `ad plugins` lists what is installed"


def _step(plugin: KnownPlugin, registry: Registry | None) -> str:
    record = registry.find(plugin.distribution) or registry.find(plugin.name) if registry else None
    if record is not None:
        mend = f"{record.distribution} is installed but {record.state}: {record.reason}; {record.fix}"
        return "" if record.state is State.LOADED else mend
    if plugin.available:
        return f"{pip_install(plugin.distribution)}   ({plugin.summary})"
    return f"it belongs to the plugin {plugin.distribution} ({plugin.summary}), which is planned and cannot be installed yet"


def _entry(name: str, fields: Mapping[str, Any]) -> KnownPlugin:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return KnownPlugin(name=name, **values)
