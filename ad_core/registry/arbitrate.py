"""Who wins when several kernels serve one canonical op. Never an accident of installation order; always with reasons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.utils import canonicalize_name

from ad_core.api.errors import AmbiguousKernelError, ConfigError, NoKernelError, nearest
from ad_core.api.mixer import Kernel, Mixer
from ad_core.api.types import Declined, Environment, OpCall, Role
from ad_core.plan import Decision
from ad_core.registry.gates import unmet
from ad_core.registry.index import install_hint
from ad_core.registry.records import Offer
from ad_core.registry.registry import Registry
from ad_core.registry.validate import op_name


def choose_kernel(
    call: OpCall,
    registry: Registry,
    environment: Environment,
    *,
    kernels: Mapping[str, str] | None = None,
    prefer: Sequence[str] = (),
    members: Sequence[str] = (),
) -> tuple[Offer[Kernel] | None, Decision]:
    """The kernel that serves `call`, and the decision for the plan.

    First whoever cannot do it drops out (device, dtype, requirements, `supports`), then the user's `kernels[op]` decides,
    then priority among the kernels of the op's owner and of those named in `prefer` (distributions, plugins or kernels).
    `members` are the nodes that the decision covers, by default the call's own.

    None is the answer for a canonical op without memory that no kernel serves: it computes itself. Raises `ConfigError` if
    the configured kernel is unknown or declines, `NoKernelError` if nothing is left, `AmbiguousKernelError` if kernels of
    several distributions tie.
    """
    field = _Field(call, registry, tuple(prefer), tuple(members) or (call.node,))
    candidates = registry.kernels_for(call.op)
    able = []
    for offer in candidates:
        reason = _inability(offer.item, call, environment, field.dtype)
        if reason:
            field.losers[offer.item.name] = reason
        else:
            able.append(offer)
    configured = (kernels or {}).get(call.op)
    if configured is not None:
        return field.win(_configured(configured, call, candidates, able, field), "config", able, "the configuration names another")
    eligible = [offer for offer in able if field.eligible(offer)]
    for offer in able:
        if offer not in eligible:
            field.losers[offer.item.name] = f"it does not come from the op's owner; prefer = [{offer.distribution!r}] admits it"
    if not eligible:
        return field.nobody(candidates)
    top = max(offer.item.priority for offer in eligible)
    best = sorted((offer for offer in eligible if offer.item.priority == top), key=lambda offer: offer.item.name)
    if len({offer.distribution for offer in best}) > 1:
        raise _tie(call, best)
    rule = "owner" if best[0].plugin == field.owner else "prefer"
    return field.win(best[0], f"{rule}, by priority" if len(eligible) > 1 else rule, eligible, f"its priority is not above {top}")


def check_choices(registry: Registry, kernels: Mapping[str, str], prefer: Iterable[str]) -> None:
    """Refuses choices that could never have an effect: ops, kernels and preferred distributions that are not there.

    Raises `ConfigError` with the nearest name.
    """
    ops = {op_name(offer.item) for offer in registry.canonical_ops()}
    for op, kernel in kernels.items():
        if op not in ops:
            raise ConfigError(f"no loaded plugin owns the op {op!r}", where="kernels", hint=_suggest(op, ops))
        names = {offer.item.name for offer in registry.kernels_for(op)}
        if kernel not in names:
            raise ConfigError(f"there is no kernel {kernel!r} for {op}", where=f"kernels.{op}", hint=_suggest(kernel, names))
    known = {name for record in registry.plugins for name in (record.name, record.distribution)}
    known |= {offer.item.name for op in ops for offer in registry.kernels_for(op)}
    for name in prefer:
        if not {name, canonicalize_name(name)} & known:
            raise ConfigError(f"nothing installed is called {name!r}", where="prefer", hint=_suggest(name, known))


@dataclass
class _Field:
    """One contest: who owns the op, who is admitted beside the owner, and why the others lost."""

    call: OpCall
    registry: Registry
    prefer: tuple[str, ...]
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        owner = self.registry.owner(self.call.op)
        self.owner = owner.name if owner else ""
        self.canonical = self.registry.canonical(self.call.op)
        self.dtype = _dtype(self.call, self.canonical.item.roles if self.canonical else {})
        self.losers: dict[str, str] = {}

    def eligible(self, offer: Offer[Kernel]) -> bool:
        wanted = {*self.prefer, *map(canonicalize_name, self.prefer)}
        return offer.plugin == self.owner or bool(wanted & {offer.plugin, offer.distribution, offer.item.name})

    def win(self, winner: Offer[Kernel], rule: str, others: Iterable[Offer[Kernel]], because: str) -> tuple[Offer[Kernel], Decision]:
        for offer in others:
            if offer is not winner:
                self.losers.setdefault(offer.item.name, because)
        return winner, self.decision(winner.item.name, rule)

    def nobody(self, candidates: Sequence[Offer[Kernel]]) -> tuple[None, Decision]:
        if self.canonical is not None and not isinstance(self.canonical.item, Mixer):
            return None, self.decision(self.call.op, "no kernel serves it here; it keeps no memory and computes itself")
        raise NoKernelError(
            f"no kernel can run {self.call.op} here",
            where=self.call.module or self.call.node,
            why=_listed(self.losers) if candidates else "no loaded plugin brings a kernel for it",
            hint=install_hint(self.registry, op=self.call.op),
        )

    def decision(self, winner: str, rule: str) -> Decision:
        return Decision(self.call.op, winner, rule, dict(sorted(self.losers.items())), self.members)


def _inability(kernel: Kernel, call: OpCall, environment: Environment, dtype: str) -> str:
    """Why the kernel cannot serve the call; the empty string if it can."""
    if environment.device not in kernel.devices:
        return f"it runs on {' and '.join(sorted(kernel.devices))}, not on {environment.device}"
    if dtype and dtype not in kernel.dtypes:
        return f"it computes {', '.join(sorted(kernel.dtypes))}, not {dtype}"
    missing = [reason for reason in map(unmet, kernel.requires) if reason]
    if missing:
        return "; ".join(missing)
    try:
        answer = kernel.supports(call, environment)
    except Exception as error:  # one plugin's mistake must not decide over another's kernel
        return f"its supports() raised {type(error).__name__}: {error}"
    if answer is None:
        return ""
    return answer.reason if isinstance(answer, Declined) else f"its supports() returned {answer!r} instead of None or Declined"


def _dtype(call: OpCall, roles: Mapping[str, Role]) -> str:
    """The dtype that a call computes in: that of its first floating TOKEN argument, or "" if it has none."""
    for name, role in roles.items():
        dtype: Any = getattr(call.arguments.get(name), "dtype", None)
        if role is Role.TOKEN and getattr(dtype, "is_floating_point", False):
            return str(dtype).removeprefix("torch.")
    return ""


def _configured(
    name: str, call: OpCall, candidates: Sequence[Offer[Kernel]], able: Sequence[Offer[Kernel]], field: _Field
) -> Offer[Kernel]:
    for offer in able:
        if offer.item.name == name:
            return offer
    if name in field.losers:
        raise ConfigError(
            f"the configured kernel {name!r} cannot run {call.op} here",
            where=call.module or call.node,
            why=field.losers[name],
            hint=f"take {call.op!r} out of `kernels`, or name one of: {', '.join(o.item.name for o in able) or 'none can'}",
        )
    names = [offer.item.name for offer in candidates]
    raise ConfigError(f"there is no kernel {name!r} for {call.op}", where=f"kernels.{call.op}", hint=_suggest(name, names))


def _tie(call: OpCall, best: Sequence[Offer[Kernel]]) -> AmbiguousKernelError:
    lines = "\n         ".join(f'kernels = {{"{call.op}" = "{offer.item.name}"}}   # {offer.distribution}' for offer in best)
    return AmbiguousKernelError(
        f"kernels of {' and '.join(sorted({offer.distribution for offer in best}))} tie for {call.op}",
        where=call.module or call.node,
        why=f"each has priority {best[0].item.priority}",
        hint=f"put one of these lines into the configuration:\n         {lines}",
    )


def _listed(losers: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in losers.items())


def _suggest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = nearest(name, names)
    return f"did you mean {close!r}?" if close else f"known are: {', '.join(names) or 'none'}"
