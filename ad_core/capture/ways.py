"""From a source to a canonical graph: the ways in, tried in order, each held against the module itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from textwrap import shorten

import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api.errors import AdError, CaptureError, CheckpointError, ConfigError, PluginError, UnclaimedMixerError
from ad_core.api.matching import Matcher, Seam
from ad_core.capture.export import Entries, Exported, export_module
from ad_core.capture.foresight import contradiction
from ad_core.capture.matching import Matched, apply_matchers
from ad_core.capture.scope import configurations
from ad_core.capture.seams import opened, reaching
from ad_core.capture.source import ModelSource
from ad_core.capture.verify import SIZE_LIMIT, NumbersError, Reference, verify_numbers, verify_structure, vocabulary_of
from ad_core.capture.weights import Progress, place_weights
from ad_core.graph.calls import module_class, module_path
from ad_core.graph.edit import set_tensor, tensor_path, tensors_read
from ad_core.graph.ops import qualified_name
from ad_core.graph.tokens import MixingNode
from ad_core.graph.unclaimed import RegistryHint, unclaimed_error
from ad_core.plan import Attempt, Claim, Plan
from ad_core.registry.records import Offer

_FATAL = (CheckpointError, ConfigError, PluginError)
"""No other way in would fare better."""


@dataclass(frozen=True)
class Way:
    """One way in: what is open while the module is exported. `seams` names what it goes through by the op that they put in."""

    name: str
    opened: Callable[[Entries], AbstractContextManager[None]]
    seams: dict[str, str] = field(default_factory=dict, hash=False)
    give_positions: bool = True
    """Whether the module is given `position_ids` or left to its own."""


@dataclass(frozen=True)
class Captured:
    """A canonical graph. `loaded` says that its weights are in place already, `numbers` that its logits were compared."""

    graph: GraphModule
    way: str
    entered: Counter[str]
    numbers: bool
    loaded: bool
    exported: Exported


def capture(
    source: ModelSource,
    *,
    plan: Plan,
    seams: Sequence[Offer[Seam]] = (),
    matchers: Sequence[Offer[Matcher]] = (),
    ops: Collection[str] = (),
    device: torch.device | str = "cpu",
    clean: Callable[[GraphModule], None] | None = None,
    verify: bool | None = None,
    size_limit: int = SIZE_LIMIT,
    hint: RegistryHint | None = None,
    progress: Progress | None = None,
) -> Captured:
    """Captures the source's module for `device`, by the first way in whose graph stands up to the verifier.

    `ops` are the canonical ops by name; `clean` runs the clean-up passes on a graph in place. Numbers are compared if the weights take
    at most `size_limit` bytes, or always or never if `verify` says so; then they are loaded (`progress`) and the graph has them.
    Records attempts, claims and decisions in `plan`. The module is left as it was. Raises `UnclaimedMixerError` or
    `CaptureError` with the reason of every way; if numbers are compared, a module that contradicts itself is refused for that.
    """
    device = torch.device(device)
    compare = source.nbytes <= size_limit if verify is None else verify
    reference = None
    failures: list[tuple[str, Exception]] = []
    ways = list(reversed(list(_ways(source, seams, plan, failures))))
    if source.counts_otherwise:
        ways = [_own_positions(way) for way in ways]
    while ways:
        way = ways.pop()
        marks = len(plan.passes), len(plan.decisions)
        entries, no_hope = Entries(), False
        try:
            graph, exported, matched = _one_way(source, way, entries, device, clean, matchers, plan)
            with plan.phase("verify"):
                mixing = verify_structure(graph, ops, entries.counts, entries.executed)
                if mixing:
                    no_hope = bool(way.seams) and _beside_the_seams(graph, mixing, way)
                    raise unclaimed_error(mixing, hint or RegistryHint())
            verdict = f"structure verified, numbers not: {_why_not(source, size_limit, verify)}"
            if compare:
                with plan.phase("weights"):
                    place_weights(graph, source.weights(device, progress))
                with plan.phase("verify"):
                    reference = reference or Reference(source.runnable(device), source.max_model_len, source.special_ids)
                    verdict = f"structure and numbers verified: {verify_numbers(graph, reference, source.dtype, device)}"
        except _FATAL:
            raise
        except Exception as error:  # any code of the author's and of torch.export runs here; what it raises refuses this way
            del plan.passes[marks[0] :], plan.decisions[marks[1] :]
            failures.append((way.name, error))
            plan.attempts.append(Attempt(way.name, False, _reason(error)))
            told = way.give_positions and isinstance(error, NumbersError) and reference is not None
            if told and not reference.counts_from_zero(vocabulary_of(graph)):  # type: ignore[union-attr]
                ways.append(_own_positions(way))
            if no_hope:
                break
            continue
        if exported.note:
            plan.notes.append(exported.note)
        plan.attempts.append(Attempt(way.name, True, verdict))
        plan.claims.extend(_claims(graph, ops, way, matched, entries.counts))
        return Captured(graph, way.name, entries.counts, compare, compare or source.in_memory, exported)
    contradicts = _contradiction(source, reference, device, failures) if compare else None
    raise contradicts or _refusal(source, failures, hint or RegistryHint())


def _one_way(
    source: ModelSource,
    way: Way,
    entries: Entries,
    device: torch.device,
    clean: Callable[[GraphModule], None] | None,
    matchers: Sequence[Offer[Matcher]],
    plan: Plan,
) -> tuple[GraphModule, Exported, Matched]:
    with plan.phase("export"), way.opened(entries):
        exported = export_module(
            source.module, device=device, max_length=source.max_model_len, give_positions=way.give_positions, entries=entries
        )
    with plan.phase("match"):
        if clean is not None:
            clean(exported.graph)
        computed = {tensor_path(name): tensor for name, tensor in source.computed.items()}
        for path in tensors_read(exported.graph).keys() & computed.keys():  # matchers look into masks
            set_tensor(exported.graph, path, computed[path])
        matched = apply_matchers(exported.graph, matchers, plan)
    plan.notes.extend(f"{way.name}: {reason}" for reason in matched.declined)
    return exported.graph, exported, matched


def _own_positions(way: Way) -> Way:
    return replace(way, name=f"{way.name}, its own positions", give_positions=False)


def _ways(source: ModelSource, seams: Sequence[Offer[Seam]], plan: Plan, failures: list[tuple[str, Exception]]) -> Iterator[Way]:
    """Seams; then the plain module, for transformers' models with each attention that matchers know."""
    usable, refused = reaching(source.module, seams)
    if usable:
        by_op: dict[str, list[str]] = {}
        for offer in usable:
            by_op.setdefault(offer.item.produces, []).append(offer.item.name)
        names = {op: " and ".join(found) for op, found in by_op.items()}
        yield Way("seams", lambda entries: opened(source.module, usable, entries), names)
    elif refused:
        plan.attempts.append(Attempt("seams", False, "; ".join(refused)))
        failures.append(("seams", CaptureError("; ".join(refused))))
    implementations = _implementations(source.module)
    for name in implementations:
        yield Way(f"patterns on {name}", lambda entries, name=name: _attention(source.module, name))  # type: ignore[misc]
    if not implementations:
        yield Way("as written", lambda entries: _unchanged())


def _implementations(module: nn.Module) -> tuple[str, ...]:
    """The attention implementations to try: of a transformers model the two that compute with plain ATen ops."""
    return ("sdpa", "eager") if callable(getattr(module, "set_attn_implementation", None)) else ()


@contextmanager
def _attention(module: nn.Module, name: str) -> Iterator[None]:
    """The model computes attention by this implementation. Raises `CaptureError` if it cannot."""
    configs = configurations(module)
    before = [dict(vars(config)) for config in configs]
    try:
        if getattr(module.config, "_attn_implementation", None) != name:
            try:
                module.set_attn_implementation(name)  # type: ignore[operator]
            except (ValueError, ImportError) as error:
                raise CaptureError(f"the model does not run with {name} attention", why=str(error).splitlines()[0]) from error
            if getattr(module.config, "_attn_implementation", None) != name:
                raise CaptureError(f"the model does not let its attention be set to {name}")
        yield
    finally:
        for config, attributes in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(attributes)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def _claims(graph: GraphModule, ops: Collection[str], way: Way, matched: Matched, entered: Counter[str]) -> Iterator[Claim]:
    for node in graph.graph.nodes:
        name = qualified_name(node.target)
        if name not in ops:
            continue
        if node in matched.claims:
            by = f"matcher {matched.claims[node]}"
        elif entered[name]:
            by = f"seam {way.seams.get(name, 'of another op')}"
        else:
            by = "annotated"
        yield Claim(node.name, module_path(node), module_class(node), name, by)


def _why_not(source: ModelSource, size_limit: int, verify: bool | None) -> str:
    if verify is False:
        return "switched off"
    return f"the weights take {source.nbytes / 2**30:.1f} GiB, more than the limit of {size_limit / 2**30:.1f} GiB (verify=True forces it)"


def _beside_the_seams(graph: GraphModule, mixing: Sequence[MixingNode], way: Way) -> bool:
    """Whether all that mixes lies in modules that no seam reached: without seams these look the same, so no other way will do better."""
    reached = {module_path(node) for node in graph.graph.nodes if qualified_name(node.target) in way.seams}
    return bool(reached) and not any(f"{entry.module}.".startswith(f"{path}.") for entry in mixing for path in reached)


def _reason(error: BaseException) -> str:
    if isinstance(error, AdError):
        return f"{error.what} ({error.why})" if error.why else error.what
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _contradiction(
    source: ModelSource, reference: Reference | None, device: torch.device, failures: list[tuple[str, Exception]]
) -> CaptureError | None:
    """The error if it is the module itself that cannot be served. One that does not even run is one more of `failures`."""
    try:
        reference = reference or Reference(source.runnable(device), source.max_model_len, source.special_ids)
        why = contradiction(reference, source.dtype)
        better = _without_contradiction(source, reference) if why else None
    except Exception as error:  # the author's code and the checkpoint; the refusal says what they raised
        failures.append(("the module by itself", error))
        return None
    if why is None:
        return None
    ways = (shorten(f"{name}: {_reason(error)}", 160) for name, error in failures)
    refusal = CaptureError(
        f"{source.name} cannot be served token by token",
        where=type(source.module).__name__,
        why="\n         ".join([f"{why}, and no cache can give such answers; tried all the same", *ways]),
        hint=f"with {better} attention it agrees with itself: set attn_implementation to {better!r}, in config.json or when you build it"
        if better
        else "a causal language model is needed; its config.json may say what makes it one (is_decoder, the seed of what it draws)",
    )
    refusal.__cause__ = failures[-1][1] if failures else None
    return refusal


def _without_contradiction(source: ModelSource, reference: Reference) -> str | None:
    """The attention implementation with which the module agrees with itself."""
    for name in _implementations(source.module):
        try:
            with _attention(source.module, name):
                if contradiction(reference, source.dtype) is None:
                    return name
        except CaptureError:  # it does not run with this one
            continue
    return None


def _refusal(source: ModelSource, failures: Sequence[tuple[str, Exception]], hint: RegistryHint) -> CaptureError:
    """The error when no way led to a graph. An unclaimed mixer is the most useful thing to say."""
    ways = "\n         ".join(f"{name}: {_reason(error)}" for name, error in failures) or "there was no way in"
    unclaimed = next((error for _, error in reversed(failures) if isinstance(error, UnclaimedMixerError)), None)
    last = failures[-1][1] if failures else None
    if unclaimed is not None:
        refusal: CaptureError = UnclaimedMixerError(
            unclaimed.what, where=unclaimed.where, why=f"tried\n         {ways}", hint=unclaimed.hint
        )
    else:
        refusal = CaptureError(
            f"{source.name} cannot be captured",
            where=type(source.module).__name__,
            why=ways,
            hint="\n         ".join(
                ["each line names a way in and why it was refused; `ad doctor` shows which plugins are installed", *hint.known]
                + [f"Not loaded: {', '.join(hint.broken)}"] * bool(hint.broken)
            ),
        )
    refusal.__cause__ = last
    return refusal
