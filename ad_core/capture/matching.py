"""Matchers on an exported graph: collect what they propose, decide between them, write the winners."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from ad_core.api.errors import CaptureError
from ad_core.api.matching import Matcher, Proposal
from ad_core.api.types import Declined
from ad_core.graph.calls import module_path
from ad_core.graph.edit import refresh_value, remove_dead_code
from ad_core.graph.ops import find_op
from ad_core.plan import Decision, Plan
from ad_core.registry.records import Offer


@dataclass(frozen=True)
class Offered:
    """A proposal and who makes it."""

    proposal: Proposal
    matcher: Matcher
    distribution: str

    @property
    def rank(self) -> tuple[int, int, str]:
        """More nodes consumed, then the matcher's priority, then its name."""
        return -len(self.proposal.nodes), -self.matcher.priority, self.matcher.name


@dataclass
class Matched:
    """What matchers wrote: the matcher's name by the node of the canonical op, and "matcher: reason" for what they declined."""

    claims: dict[Node, str] = field(default_factory=dict)
    declined: list[str] = field(default_factory=list)


def apply_matchers(graph: GraphModule, matchers: Sequence[Offer[Matcher]], plan: Plan) -> Matched:
    """Rewrites `graph` in place: every winning proposal becomes one canonical op. Records contested places as decisions in `plan`.

    Raises `CaptureError` if matchers of different distributions tie on one place with different results, or propose arguments
    that the canonical op does not take.
    """
    result, offers = Matched(), list[Offered]()
    for offer in matchers:
        for found in offer.item.find(graph):
            if isinstance(found, Declined):
                result.declined.append(f"{offer.item.name}: {found.reason}")
            else:
                offers.append(Offered(found, offer.item, offer.distribution))
    replaced: dict[Node, Node] = {}
    for winner in _winners(offers, plan):
        node, value = _write(graph, winner)
        replaced[winner.proposal.output] = value
        result.claims[node] = winner.matcher.name
    for output, value in replaced.items():  # proposals were made before any was written: one may read what another replaced
        output.replace_all_uses_with(value)
    if result.claims:
        remove_dead_code(graph)
        graph.graph.lint()
        graph.recompile()
    return result


def _winners(offers: list[Offered], plan: Plan) -> list[Offered]:
    """Proposals that do not overlap; where they do, the first by rank owns the place."""
    owners: dict[Node, Offered] = {}
    winners: list[Offered] = []
    contested: dict[int, dict[str, str]] = {}
    for offer in sorted(offers, key=lambda entry: entry.rank):
        rivals = list({id(owners[node]): owners[node] for node in offer.proposal.nodes if node in owners}.values())
        if not rivals:
            owners.update(dict.fromkeys(offer.proposal.nodes, offer))
            winners.append(offer)
            continue
        for rival in rivals:
            if (
                rival.rank[:2] == offer.rank[:2]
                and rival.distribution != offer.distribution
                and not _same(rival.proposal, offer.proposal, rival, offer)
            ):
                raise _tie(rival, offer)
        contested.setdefault(id(rivals[0]), {})[offer.matcher.name] = f"overlaps: {_why(rivals[0], offer)}"
    for winner in winners:
        if losers := contested.get(id(winner)):
            plan.decisions.append(
                Decision(f"{winner.matcher.produces} at {module_path(winner.proposal.output)}", winner.matcher.name, "match", losers)
            )
    return winners


def _why(winner: Offered, loser: Offered) -> str:
    if winner.rank[0] != loser.rank[0]:
        return f"{winner.matcher.name} covers {len(winner.proposal.nodes)} nodes, this {len(loser.proposal.nodes)}"
    if winner.rank[1] != loser.rank[1]:
        return f"{winner.matcher.name} has priority {winner.matcher.priority}, this {loser.matcher.priority}"
    return f"equal to {winner.matcher.name}, which comes first by name"


def _same(first: Proposal, second: Proposal, one: Offered, other: Offered) -> bool:
    """Whether two proposals say the same thing."""
    return (
        one.matcher.produces == other.matcher.produces
        and first.nodes == second.nodes
        and first.output is second.output
        and dict(first.arguments) == dict(second.arguments)
        and (first.prepare is None) == (second.prepare is None)
        and (first.rewrite is None) == (second.rewrite is None)
    )


def _tie(first: Offered, second: Offered) -> CaptureError:
    names = [f"{offer.matcher.name} ({offer.distribution}) makes it {offer.matcher.produces}" for offer in (first, second)]
    return CaptureError(
        "two plugins claim the same part of the graph, and nothing decides between them",
        where=module_path(first.proposal.output),
        why="; ".join(names),
        hint=f"deny one of them: AD_DISABLE_PLUGINS={second.distribution}",
    )


def _write(graph: GraphModule, winner: Offered) -> tuple[Node, Node]:
    """Puts the canonical op in the place of what it stands for. Returns its node and the node that has the replaced value."""
    proposal, op = winner.proposal, find_op(winner.matcher.produces)
    output = proposal.output
    arguments = dict(proposal.arguments)
    with graph.graph.inserting_before(output):
        before = output.prev
        if proposal.prepare is not None:
            arguments |= proposal.prepare(graph)
        args, kwargs = _by_schema(winner, op, arguments)
        node = graph.graph.call_function(op, args, kwargs)
        _describe(before, output)
        value = proposal.rewrite(graph, node) if proposal.rewrite is not None else node
        _describe(before, output)
    wanted, found = output.meta.get("val"), value.meta.get("val")
    if isinstance(wanted, torch.Tensor) and (
        not isinstance(found, torch.Tensor) or found.dim() != wanted.dim() or found.dtype != wanted.dtype
    ):
        raise CaptureError(
            f"the matcher {winner.matcher.name} replaces a value by one of another form",
            where=module_path(output),
            why=f"it was {list(wanted.shape)} {wanted.dtype} and becomes {found}",
            hint="this is a fault of the matcher: report it to its plugin",
        )
    output.replace_all_uses_with(value)
    return node, value


def _by_schema(winner: Offered, op: OpOverload, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as the op takes them: positional up to the first that is left out, the others by keyword."""
    schema = op._schema.arguments
    unknown = sorted(arguments.keys() - {argument.name for argument in schema})
    missing = [argument.name for argument in schema if argument.name not in arguments and not argument.has_default_value()]
    if unknown or missing:
        problem = f"does not take: {', '.join(unknown)}" if unknown else f"needs and does not get: {', '.join(missing)}"
        raise CaptureError(
            f"the matcher {winner.matcher.name} gives {winner.matcher.produces} arguments by another schema than it has: it {problem}",
            where=module_path(winner.proposal.output),
            why=f"its schema is {op._schema}",
            hint="the matcher was written for another version of the op: update its plugin",
        )
    leading = itertools.takewhile(lambda argument: not argument.kwarg_only and argument.name in arguments, schema)
    args = {argument.name: arguments[argument.name] for argument in leading}
    return tuple(args.values()), {
        argument.name: arguments[argument.name] for argument in schema if argument.name in arguments and argument.name not in args
    }


def _describe(before: Node, end: Node) -> None:
    """Metas of the nodes that were inserted between two others: where they come from, and their fake values."""
    node = before.next
    while node is not end:
        if "val" not in node.meta:
            refresh_value(node)
        for key in ("nn_module_stack", "stack_trace"):
            if key in end.meta:
                node.meta.setdefault(key, end.meta[key])
        node = node.next
