"""The error that a user meets when a model has a mixer that nothing claims: which, where, and what would claim it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ad_core.api.errors import UnclaimedMixerError
from ad_core.graph.tokens import MixingNode

_SHOWN_NUMBERS = 4
_SHOWN_GROUPS = 8


@dataclass(frozen=True)
class RegistryHint:
    """What the registry knows: `known` are whole lines on plugins that would claim the model ("Known plugin for model_type ...:
    pip install ..."), only ever of names from the index; `installed` and `broken` name plugins with version or reason;
    `searched` says where plugins were looked for."""

    known: Sequence[str] = ()
    installed: Sequence[str] = ()
    broken: Sequence[str] = ()
    searched: str = ""


def unclaimed_error(mixing: Sequence[MixingNode], hint: RegistryHint) -> UnclaimedMixerError:
    """The error for what `find_mixing` found (at least one)."""
    groups: dict[tuple[str, str, str, str], list[MixingNode]] = {}
    for entry in mixing:
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "{}", entry.module), entry.module_class, entry.op, entry.source), []).append(
            entry
        )
    where: list[str] = []
    for (_, kind, op, source), members in list(groups.items())[:_SHOWN_GROUPS]:
        modules = list(dict.fromkeys(member.module for member in members))
        detail = ", ".join([kind] * bool(kind) + [f"{len(modules)} layers"] * (len(modules) > 1))
        where.append((_collapsed(modules) or "the model") + (f"  ({detail})" if detail else ""))
        where.append(f"    first op: {op}{f'  at {source}' if source else ''}: {members[0].reason}")
    if len(groups) > _SHOWN_GROUPS:
        where.append(f"and {len(groups) - _SHOWN_GROUPS} more kinds of places")
    regions, them = ("graph regions mix", "them") if len(mixing) > 1 else ("graph region mixes", "it")
    known = list(hint.known) or ["No known plugin claims them."]
    advice = [
        *known,
        f"Installed: {', '.join(hint.installed) or 'none'}.   Broken: {', '.join(hint.broken) or 'none'}."
        + (f"   Searched: {hint.searched}" if hint.searched else ""),
        "More:  ad explain MODEL   |   write one: a mixer plugin with a canonical op and a matcher",
    ]
    return UnclaimedMixerError(
        f"{len(mixing)} {regions} tokens but no installed plugin claims {them}, so there would be no cache for {them} "
        "and decoding would be silently wrong.",
        where="\n         ".join(where),
        hint="\n         ".join(advice),
    )


def _collapsed(paths: Sequence[str]) -> str:
    """ "model.layers.{0,1,2,...}.mixer" for paths that differ in their numbers only."""
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    shown = []
    for column in columns:
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            shown.append(values[0])
        else:
            more = ",..." if len(values) > _SHOWN_NUMBERS else ""
            shown.append("{" + ",".join(values[:_SHOWN_NUMBERS]) + more + "}")
    return ".".join(shown)
