"""Writes down the contract: everything in it that a plugin could come to rely on.

    python tools/api_snapshot.py            writes tests/api_snapshot.json
    python tools/api_snapshot.py --check    prints the difference and fails if there is one

A line that only appears is a new minor of `ad_core.api.API_VERSION` once the version was released; a line that changes or
goes is a new major, with a new entry-point group.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import ad_core.api as api
from ad_core.api import errors, hooks

SNAPSHOT = Path(__file__).resolve().parent.parent / "tests" / "api_snapshot.json"


def snapshot() -> str:
    """The contract as sorted JSON."""
    parts: dict[str, Any] = {
        "version": list(api.API_VERSION),
        "group": api.ENTRY_POINT_GROUP,
        "names": sorted(api.__all__),
        "hooks": {name: _signature(value) for name, value in vars(hooks).items() if hasattr(value, f"{hooks.PROJECT}_spec")},
        "batch fields": dict(api.FIELDS),
        "grouped batch fields": sorted(api.GROUPED_FIELDS),
        "errors": {name: value.__mro__[1].__name__ for name, value in vars(errors).items() if _is_error(value)},
        "types": {name: _describe(getattr(api, name)) for name in api.__all__ if isinstance(getattr(api, name), type)},
    }
    return json.dumps(parts, indent=1, sort_keys=True) + "\n"


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)


def _describe(kind: type) -> dict[str, str]:
    """A class's members: enum values, dataclass fields, class attributes with defaults, methods with signatures."""
    if issubclass(kind, enum.Enum):
        return {member.name: repr(member.value) for member in kind}
    members = {name: str(annotation) for name, annotation in vars(kind).get("__annotations__", {}).items()}
    defaults = {field.name: field for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    for name in members:
        if name in defaults:
            members[name] += _default(defaults[name])
        elif name in vars(kind):
            members[name] += f" = {_stable(vars(kind)[name])}"
    for name, value in vars(kind).items():
        public = not name.startswith("_") or name in ("__init__", "__getitem__")
        if public and inspect.isfunction(value) and not (name == "__init__" and defaults):
            members[name] = ("abstract " if getattr(value, "__isabstractmethod__", False) else "") + _signature(value)
        elif isinstance(value, property):
            members[name] = f"property {_signature(value.fget)}"
    return members


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {_stable(field.default)}"
    return f" = {field.default_factory.__name__}()" if field.default_factory is not dataclasses.MISSING else ""


def _signature(function: Any) -> str:
    return str(inspect.signature(function))


def _stable(value: object) -> str:
    """`repr` with sets in order."""
    return f"{{{', '.join(sorted(map(repr, value)))}}}" if isinstance(value, frozenset) else repr(value)


def main() -> int:
    """Exit status 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, print what differs")
    text = snapshot()
    if not parser.parse_args().check:
        SNAPSHOT.write_text(text, encoding="utf-8")
        print(f"wrote {SNAPSHOT.name}")
        return 0
    old = SNAPSHOT.read_text(encoding="utf-8")
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), "the snapshot", "the code"))
    return int(old != text)


if __name__ == "__main__":
    sys.exit(main())
