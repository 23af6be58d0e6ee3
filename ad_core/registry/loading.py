"""From entry points to records: gates, guarded imports, conflicts. One bad plugin costs one line, never the process."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ad_core.registry import gates
from ad_core.registry.controls import DENY, Controls
from ad_core.registry.discovery import Found, in_order
from ad_core.registry.hooks import HookError, implemented
from ad_core.registry.records import PluginRecord, State, pip_install

GIVEN = "given"
"""The version of a plugin that was handed over as an object and comes from no distribution."""


def load_plugins(found: Iterable[Found], controls: Controls) -> list[PluginRecord]:
    """A record for every plugin, sorted by name and distribution. Imports those that no gate before it refuses."""
    records, candidates = [], []
    for entry in in_order(found):
        refused = _before_import(entry, controls)
        if refused is not None:
            records.append(refused)
        else:
            candidates.append(entry)
    by_name = defaultdict(list)
    for entry in candidates:
        by_name[entry.name].append(entry)
    imported = []
    for name, rivals in by_name.items():
        if len(rivals) == 1:
            imported.append(_import(rivals[0]))
        else:
            records += [_conflict(_record(entry, State.CONFLICT), f"the plugin name {name!r}", rivals) for entry in rivals]
    records += _refuse_shared_namespaces(imported)
    return sorted(records, key=lambda record: (record.name, record.distribution))


def given(module: Any) -> Found:
    """A plugin handed over as an object (a test's, a notebook's, the core's own) as if it had been discovered."""
    package = str(getattr(module, "__name__", type(module).__name__)).partition(".")[0]
    name = getattr(getattr(module, "INFO", None), "name", None)
    name = name if isinstance(name, str) else package
    return Found(name, package.replace("_", "-"), GIVEN, getattr(module, "__name__", repr(module)), given=True, load=lambda: module)


def broken(record: PluginRecord, error: BaseException, doing: str) -> PluginRecord:
    """The record of a plugin that raised `error`."""
    if isinstance(error, HookError):
        reason = str(error)
    else:
        message = next(iter(str(error).strip().splitlines()), "")
        reason = f"{doing} raised {type(error).__name__}" + (f": {message}" if message else "")
    text = "".join(traceback.format_exception(error))
    return replace(record, state=State.BROKEN, reason=reason, fix=f"`ad doctor {record.name}` tells more", traceback=text, error=error)


def conflicting(record: PluginRecord, claim: str, others: Sequence[str]) -> PluginRecord:
    """The record of a plugin that claims what distributions `others` claim too."""
    rivals = sorted({record.distribution, *others})
    return replace(
        record,
        state=State.CONFLICT,
        reason=f"{claim} is claimed by {' and '.join(rivals)}",
        fix=f"uninstall one of them, or set {DENY}={' or '.join(rivals)}",
    )


def _before_import(entry: Found, controls: Controls) -> PluginRecord | None:
    """The record of a plugin that is refused without importing it."""
    reason, fix = controls.verdict(entry)
    if reason:
        return _record(entry, State.BLOCKED, reason, fix)
    if entry.problem:
        return _record(entry, State.BROKEN, entry.problem, pip_install(entry.distribution))
    reason = gates.distribution_gate(entry)
    return _record(entry, State.INCOMPATIBLE, reason, pip_install(gates.CORE_DISTRIBUTION, entry.distribution)) if reason else None


def _import(entry: Found) -> PluginRecord:
    """Imports the plugin and looks at its `INFO` and the names of its hooks. Only `KeyboardInterrupt` comes out."""
    record = _record(entry, State.LOADED)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints must not spoil `ad plugins --json`
            module = entry.load()
        problem = gates.info_problem(module, entry.name)
        if problem:
            raise HookError(problem)
        info = module.INFO
        reason = gates.info_gate(info)
        if reason:
            fix = pip_install(gates.CORE_DISTRIBUTION, entry.distribution)
            return replace(record, state=State.INCOMPATIBLE, reason=reason, fix=fix, info=info)
        return replace(record, info=info, module=module, hooks=implemented(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a plugin may not end the process
        record = broken(record, error, "its import")
        missing = gates.unmet_requirements(entry) if isinstance(error, ImportError) else []
        return replace(record, fix=pip_install(*missing)) if missing else record


def _refuse_shared_namespaces(records: Sequence[PluginRecord]) -> list[PluginRecord]:
    claims = defaultdict(list)
    for record in records:
        for namespace in record.info.op_namespaces if record.state is State.LOADED and record.info else ():
            claims[namespace].append(record)
    refused: dict[str, PluginRecord] = {}
    for namespace, rivals in claims.items():
        if len(rivals) > 1:
            for record in rivals:
                refused[record.name] = conflicting(record, f"the op namespace {namespace!r}", [rival.distribution for rival in rivals])
    return [refused.get(record.name, record) for record in records]


def _conflict(record: PluginRecord, claim: str, rivals: Sequence[Found]) -> PluginRecord:
    return conflicting(record, claim, [rival.distribution for rival in rivals])


def _record(entry: Found, state: State, reason: str = "", fix: str = "") -> PluginRecord:
    return PluginRecord(entry.name, entry.distribution, entry.version, entry.value, state, reason, fix)
