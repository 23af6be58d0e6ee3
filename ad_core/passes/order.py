"""The order of passes: stages one after the other, inside a stage a topological sort, ties by name.

The same passes give the same order, whatever order they were installed or discovered in.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ad_core.api.errors import PassOrderError, PluginConflictError
from ad_core.api.passes import Pass
from ad_core.api.types import Stage


class PassOffer(NamedTuple):
    """A pass, the distribution that brings it, and its plugin's section of the configuration."""

    offered: Pass
    distribution: str
    options: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        return self.offered.name

    @property
    def stage(self) -> Stage:
        return Stage(self.offered.stage)


@dataclass(frozen=True)
class _Edge:
    """`first` runs before `second`, because of what `said_by` said."""

    first: str
    second: str
    said_by: str
    saying: str


def ordered(offers: Sequence[PassOffer]) -> list[PassOffer]:
    """All offers in the order in which they run.

    Raises `PluginConflictError` for two passes of one name, and `PassOrderError` for a required pass that is missing, passes that
    exclude each other, an order that contradicts the stages, or a cycle: the message names who said what.
    """
    by_name = _by_name(offers)
    edges = _edges(by_name)
    result: list[PassOffer] = []
    for stage in Stage:
        names = sorted(name for name, offer in by_name.items() if offer.stage is stage)
        result += [by_name[name] for name in _sorted(names, [edge for edge in edges if edge.first in names], stage, by_name)]
    return result


def _by_name(offers: Sequence[PassOffer]) -> dict[str, PassOffer]:
    found: dict[str, PassOffer] = {}
    for offer in offers:
        other = found.setdefault(offer.name, offer)
        if other is not offer:  # as it is the first time
            first, second = sorted((other.distribution, offer.distribution))
            raise PluginConflictError(
                f"two passes are named {offer.name!r}",
                where=f"distributions {first} and {second}" if first != second else f"distribution {first}, twice",
                hint="uninstall one of them, or deny its plugin with AD_DISABLE_PLUGINS",
            )
    return found


def _edges(by_name: Mapping[str, PassOffer]) -> list[_Edge]:
    """What is said about order within a stage, checked against the stages."""
    found: list[_Edge] = []
    for name in sorted(by_name):
        offer = by_name[name]
        for other in offer.offered.conflicts:
            if other in by_name:
                raise PassOrderError(
                    f"the passes {_who(offer)} and {_who(by_name[other])} exclude each other",
                    why=f"{name} says conflicts={other}",
                    hint="deny the plugin of one of them (`deny_plugins`, or AD_DISABLE_PLUGINS)",
                )
        for other in offer.offered.requires:
            if other not in by_name:
                raise PassOrderError(
                    f"the pass {_who(offer)} requires the pass {other}, which no installed plugin brings",
                    hint=f"install the plugin of {other}, or deny that of {name} (`deny_plugins`)",
                )
        said = [(other, "requires", False) for other in offer.offered.requires]
        said += [(other, "after", False) for other in offer.offered.after] + [(other, "before", True) for other in offer.offered.before]
        for other, word, other_is_later in said:
            if other not in by_name:
                continue
            earlier, later = (offer, by_name[other]) if other_is_later else (by_name[other], offer)
            if earlier.stage > later.stage:
                raise PassOrderError(
                    f"the pass {_who(offer)} says {word}={other}, which contradicts the stages",
                    why=f"{name} is of stage {offer.stage.name} and {_who(by_name[other])} of stage {by_name[other].stage.name}",
                    hint="order within a stage is a pass's to declare, the order of stages is fixed",
                )
            if earlier.stage is later.stage:
                found.append(_Edge(earlier.name, later.name, name, f"{word}={other}"))
    return found


def _sorted(names: Sequence[str], edges: Sequence[_Edge], stage: Stage, by_name: Mapping[str, PassOffer]) -> list[str]:
    waiting_for = {name: {edge.first for edge in edges if edge.second == name} for name in names}
    ready = [name for name in names if not waiting_for[name]]
    result: list[str] = []
    while ready:
        name = heapq.heappop(ready)
        result.append(name)
        for other in names:
            if name in waiting_for[other]:
                waiting_for[other].discard(name)
                if not waiting_for[other]:
                    heapq.heappush(ready, other)
    if len(result) < len(names):
        raise _cycle_error([name for name in names if name not in result], edges, stage, by_name)
    return result


def _cycle_error(stuck: Sequence[str], edges: Sequence[_Edge], stage: Stage, by_name: Mapping[str, PassOffer]) -> PassOrderError:
    """Walks back from a stuck pass: everything stuck waits for something stuck, so the walk must come round."""
    into = {name: next(edge for edge in edges if edge.second == name and edge.first in stuck) for name in stuck}
    walked, name = [], stuck[0]
    while name not in walked:
        walked.append(name)
        name = into[name].first
    circle = walked[walked.index(name) :][::-1]
    circle = circle[circle.index(min(circle)) :] + circle[: circle.index(min(circle))]
    lines = []
    for member in [*circle[1:], circle[0]]:
        edge = into[member]
        sayer = by_name[edge.said_by]
        lines.append(f"    {edge.first} -> {edge.second}   ({_who(sayer)} says {edge.saying})")
    return PassOrderError(
        f"cycle among the passes of stage {stage.name}:\n" + "\n".join(lines),
        hint="deny the plugin of one of these passes (`deny_plugins`, or AD_DISABLE_PLUGINS), and report the contradiction to it",
    )


def _who(offer: PassOffer) -> str:
    return f"{offer.name} [{offer.distribution}]"
