"""The rows of `ad plugins`, without the option parser: that alone would take longer than the whole answer may."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ad_core.api.types import ENTRY_POINT_GROUP
from ad_core.registry import PluginRecord, Registry, State


def listing(as_json: bool) -> str:
    """Every installed plugin as a table, or as JSON. Imports plugins, calls no hook, works when all of them are broken."""
    records = quiet_registry().plugins
    if as_json:
        import json

        return json.dumps([as_dict(record) for record in records], indent=2)
    if not records:
        return f"no plugin is installed (searched: {sys.executable}, group {ENTRY_POINT_GROUP})"
    return "\n".join(table([("name", "dist", "version", "api", "state", "offers"), *map(_row, records)]))


def quiet_registry() -> Registry:
    """Everything installed. What cannot be loaded stands in the records; it is neither logged nor, if `AD_STRICT`, raised."""
    logging.getLogger("ad_core").setLevel(logging.CRITICAL)
    return Registry.load(strict=False)


def as_dict(record: PluginRecord) -> dict[str, Any]:
    """The record as plain data: the machine-readable form of a row."""
    return {
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "module": record.value,
        "api": list(record.info.api) if record.info else None,
        "state": str(record.state),
        "reason": record.reason,
        "fix": record.fix,
        "offers": offers(record),
        "op_namespaces": list(record.info.op_namespaces) if record.info else [],
        "summary": record.info.summary if record.info else "",
    }


def offers(record: PluginRecord) -> list[str]:
    """The kinds of things that a plugin offers: its hooks without their prefix."""
    return [hook.removeprefix("ad_") for hook in record.hooks]


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines; the last column is as long as it needs to be, so that its lines can be copied whole."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


def _row(record: PluginRecord) -> tuple[str, ...]:
    api = ".".join(map(str, record.info.api)) if record.info else "-"
    if record.state is State.LOADED:
        last = ", ".join(offers(record)) + (f"  ({record.info.summary})" if record.info and record.info.summary else "")
    else:
        last = f"{record.reason}  -> {record.fix}"
    return record.name, record.distribution, record.version, api, str(record.state), last
