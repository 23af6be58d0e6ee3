"""What is installed, as objects: the one place that asks plugins."""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ad_core.api.errors import PluginError
from ad_core.api.loading import CompileBackend, Loader
from ad_core.api.matching import Matcher, Seam
from ad_core.api.mixer import CanonicalOp, Kernel, Mixer
from ad_core.api.passes import Pass
from ad_core.api.types import PluginInfo
from ad_core.registry import hooks
from ad_core.registry.controls import Controls
from ad_core.registry.discovery import scan
from ad_core.registry.loading import GIVEN, broken, conflicting, given, load_plugins
from ad_core.registry.records import Offer, PluginRecord, State
from ad_core.registry.validate import name_of, op_name

if TYPE_CHECKING:
    import typer

Kind = TypeVar("Kind")

log = logging.getLogger("ad_core")


@dataclass(frozen=True)
class RegistrySpec:
    """A registry in plain text, for another process: each plugin's name, distribution, version, module and state."""

    plugins: tuple[tuple[str, str, str, str, str], ...]
    modules: tuple[str, ...] = ()
    """Modules that were handed over, by name."""
    installed: bool = True
    """Whether entry points count at all."""
    strict: bool = False


class Registry:
    """Plugins and what they offer. Made by `load` or `isolated`; plugins are imported there and then, and never later.

    Hooks run when something is first asked for, one plugin at a time. A plugin that fails then becomes broken (or, if it
    shares a name with another's object, both become conflicts) and none of its offers is given out any more. Items are
    cached: the same kernel is the same object for the life of the registry. May be used from several threads.
    """

    def __init__(self, records: Sequence[PluginRecord], *, strict: bool = False, installed: bool = True):
        self._records = {(record.name, record.distribution): record for record in records}
        self._at_load, self._strict, self._installed = tuple(records), strict, installed
        self._items: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._lock = threading.RLock()
        for record in records:
            self._report(record)

    @classmethod
    def load(
        cls,
        allow: Iterable[str] | None = None,
        deny: Iterable[str] | None = None,
        extra: Sequence[Any] = (),
        strict: bool | None = None,
    ) -> Registry:
        """Discovers and imports what is installed, and takes the modules in `extra` as plugins too.

        `allow` and `deny` hold names of plugins or distributions, beside those of the environment (`AD_PLUGINS`,
        `AD_DISABLE_PLUGINS`). Raises a `PluginError` if `allow` names what is not installed and, when `strict` (by default
        `AD_STRICT`), for the first plugin that fails, now or in a hook.
        """
        controls, found = Controls.read(allow, deny, strict), [*scan(), *map(given, extra)]
        unknown = controls.unknown(found)
        if unknown:
            error = PluginError(
                f"allowed, but not installed: {', '.join(unknown)}",
                why=f"installed: {', '.join(sorted({entry.name for entry in found})) or 'none'}",
                hint="`ad plugins` lists what is installed",
            )
            if allow is not None or controls.strict:
                raise error
            log.warning("ad: %s", error.what)
        return cls(load_plugins(found, controls), strict=controls.strict)

    @classmethod
    def isolated(cls, *modules: Any, strict: bool = True) -> Registry:
        """A registry of these plugins alone, whatever is installed and set in the environment."""
        return cls(load_plugins(map(given, modules), Controls(strict=strict)), strict=strict, installed=False)

    @classmethod
    def from_spec(cls, spec: RegistrySpec) -> Registry:
        """The same registry in another process. Raises `PluginError` if other plugins or versions are installed here."""
        extra = [importlib.import_module(name) for name in spec.modules]
        installed = [name for name, _, _, value, _ in spec.plugins if value not in spec.modules]
        if spec.installed:
            registry = cls.load(allow=installed, extra=extra, strict=spec.strict)
        else:
            registry = cls.isolated(*extra, strict=spec.strict)
        differing = set(spec.plugins) ^ set(registry.to_spec().plugins)
        if differing:
            lines = "; ".join(" ".join(entry) for entry in sorted(differing))
            raise PluginError("two processes see different plugins", why=lines, hint="install the same distributions for all of them")
        return registry

    def to_spec(self) -> RegistrySpec:
        """Plain text from which another process makes the same registry; what is blocked here is blocked there.

        Raises `PluginError` for a plugin that was handed over as an object which no import would find.
        """
        wanted = [record for record in self._at_load if record.state is not State.BLOCKED]
        modules = tuple(record.value for record in wanted if record.version == GIVEN)
        for name in modules:
            if name == "__main__" or name not in sys.modules:
                raise PluginError(f"the plugin {name!r} lives in this process alone", hint="put it into a module that can be imported")
        entries = tuple((r.name, r.distribution, r.version, r.value, str(r.state)) for r in wanted)
        return RegistrySpec(entries, modules, self._installed, self._strict)

    # -- plugins ------------------------------------------------------------------------------------------------------

    @property
    def plugins(self) -> tuple[PluginRecord, ...]:
        """Every plugin, loaded or not, by name."""
        return tuple(self._records.values())

    @property
    def infos(self) -> tuple[PluginInfo, ...]:
        """What the loaded plugins say of themselves."""
        return tuple(record.info for record in self._loaded() if record.info is not None)

    def find(self, name: str) -> PluginRecord | None:
        """The plugin of this name, or the first of this distribution."""
        named = [record for record in self.plugins if name in (record.name, record.distribution)]
        return next((record for record in named if record.state is State.LOADED), named[0] if named else None)

    def owner(self, op: str) -> PluginRecord | None:
        """The loaded plugin whose op namespace holds `op` ("ad_toy::mix")."""
        namespace = op.partition("::")[0]
        return next((record for record in self._loaded() if record.info and namespace in record.info.op_namespaces), None)

    def check(self) -> tuple[PluginRecord, ...]:
        """Calls every hook of every plugin, then tells how each fares. Imports what the plugins' hooks import."""
        for ask in (self.mixers, self.ops, self._kernels, self._all_matchers, self.passes, self.compilers, self.loaders, self.drafters):
            ask()
        self.commands()
        return self.plugins

    # -- what they offer ----------------------------------------------------------------------------------------------

    def mixers(self) -> tuple[Offer[Mixer], ...]:
        """Canonical ops that keep memory."""
        return tuple(_narrowed(self.canonical_ops(), Mixer))

    def ops(self) -> tuple[Offer[CanonicalOp], ...]:
        """Canonical ops without memory."""
        return tuple(offer for offer in self.canonical_ops() if not isinstance(offer.item, Mixer))

    def canonical_ops(self) -> tuple[Offer[CanonicalOp], ...]:
        """Mixers and ops without memory."""
        return self._named(lambda: [*self._offers("ad_mixers"), *self._offers("ad_ops")])

    def canonical(self, op: str) -> Offer[CanonicalOp] | None:
        """The canonical op of this qualified name."""
        return next((offer for offer in self.canonical_ops() if op_name(offer.item) == op), None)

    def kernels_for(self, op: str) -> tuple[Offer[Kernel], ...]:
        """Every kernel that serves the canonical op, its owner's and others'."""
        return tuple(offer for offer in self._kernels() if offer.item.target == op)

    def matchers(self) -> tuple[Offer[Matcher], ...]:
        """Those of canonical ops, and those that plugins add to ops of others."""
        return tuple(_narrowed(self._all_matchers(), Matcher))

    def seams(self) -> tuple[Offer[Seam], ...]:
        """Likewise."""
        return tuple(_narrowed(self._all_matchers(), Seam))

    def passes(self) -> tuple[Offer[Pass], ...]:
        """Passes of plugins; the core's own are not among them."""
        return self._named(lambda: self._offers("ad_passes"))

    def compilers(self) -> tuple[Offer[CompileBackend], ...]:
        """Compile backends of plugins."""
        return self._named(lambda: self._offers("ad_compilers"))

    def loaders(self) -> tuple[Offer[Loader], ...]:
        """Checkpoint formats of plugins."""
        return self._named(lambda: self._offers("ad_loaders"))

    def drafters(self) -> tuple[Offer[object], ...]:
        """Speculative proposers. Nothing runs them yet."""
        return self._named(lambda: self._offers("ad_drafters"))

    def commands(self) -> tuple[Offer[typer.Typer], ...]:
        """Sub-commands of `ad`."""
        return self._named(lambda: self._offers("ad_commands"))

    # -- asking -------------------------------------------------------------------------------------------------------

    def _kernels(self) -> tuple[Offer[Kernel], ...]:
        return self._named(lambda: [*self._parts("kernels"), *self._offers("ad_kernels")])

    def _all_matchers(self) -> tuple[Offer[Matcher | Seam], ...]:
        return self._named(lambda: [*self._parts("matchers"), *self._offers("ad_matchers")])

    def _parts(self, attribute: str) -> Iterator[Offer[Any]]:
        for offer in self.canonical_ops():
            for part in getattr(offer.item, attribute):
                yield Offer(part, offer.plugin, offer.distribution)

    def _offers(self, hook: str) -> list[Offer[Any]]:
        """What the loaded plugins return from one hook. A plugin that fails becomes broken and offers nothing."""
        offers: list[Offer[Any]] = []
        with self._lock:
            for record in self._loaded():
                key = (hook, record.name)
                if key not in self._items:
                    try:
                        assert record.info is not None
                        self._items[key] = hooks.call(record.module, record.info, hook)
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:  # SystemExit too: a plugin may not end the process
                        self._replace(broken(record, error, f"its hook {hook}()"))
                        continue
                offers += [Offer(item, record.name, record.distribution) for item in self._items[key]]
        return offers

    def _named(self, collect: Any) -> tuple[Offer[Any], ...]:
        """The offers that `collect` yields, sorted by name. An object listed twice by its plugin counts once; a name that
        several objects have makes their plugins conflicts (or, if it is one plugin's, broken), and is collected anew."""
        with self._lock:
            while True:
                offers = list({(id(offer.item), offer.plugin): offer for offer in collect()}.values())
                rivals: dict[str, list[Offer[Any]]] = defaultdict(list)
                for offer in offers:
                    rivals[name_of(offer.item)].append(offer)
                shared = {name: claims for name, claims in rivals.items() if len(claims) > 1}
                if not shared:
                    loaded = {record.name for record in self._loaded()}
                    kept = [offer for offer in offers if offer.plugin in loaded]
                    return tuple(sorted(kept, key=lambda offer: (name_of(offer.item), offer.distribution)))
                for name, claims in shared.items():
                    self._refuse(name, claims)

    def _refuse(self, name: str, claims: Sequence[Offer[Any]]) -> None:
        by_plugin = {offer.plugin: self.find(offer.plugin) for offer in claims}
        for record in filter(None, by_plugin.values()):
            if len(by_plugin) == 1:
                self._replace(broken(record, hooks.HookError(f"it offers two different objects named {name!r}"), ""))
            elif record.state is State.LOADED:
                self._replace(conflicting(record, f"the name {name!r}", [offer.distribution for offer in claims]))

    def _loaded(self) -> list[PluginRecord]:
        return [record for record in self._records.values() if record.state is State.LOADED]

    def _replace(self, record: PluginRecord) -> None:
        self._records[(record.name, record.distribution)] = record
        self._report(record)

    def _report(self, record: PluginRecord) -> None:
        """One line for a plugin that cannot be used; an error if the registry is strict."""
        if record.state in (State.LOADED, State.BLOCKED):
            return
        if self._strict:
            raise record.to_error() from record.error
        log.warning("ad: %s", record.line)


def _narrowed(offers: Iterable[Offer[Any]], kind: type[Kind]) -> Iterator[Offer[Kind]]:
    return (offer for offer in offers if isinstance(offer.item, kind))


def isolated(*modules: Any, strict: bool = True) -> Registry:
    """See `Registry.isolated`."""
    return Registry.isolated(*modules, strict=strict)
