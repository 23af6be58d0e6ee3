"""Writes the index of known plugins from the plugins of this repository, docs/support.md and tools/known_plugins.toml.

python tools/gen_index.py            writes ad_core/registry/known_plugins.json
python tools/gen_index.py --check    fails if it would change
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

from ad_core.api import ENTRY_POINT_GROUP
from ad_core.registry import Registry
from ad_core.registry.validate import op_name

ROOT = Path(__file__).resolve().parent.parent
CURATED = ROOT / "tools" / "known_plugins.toml"
SUPPORT = ROOT / "docs" / "support.md"
INDEX = ROOT / "ad_core" / "registry" / "known_plugins.json"


def index() -> str:
    """The index's text. Raises if a plugin of this repository cannot be loaded."""
    plugins: dict[str, dict[str, Any]] = tomllib.loads(CURATED.read_text(encoding="utf-8"))["plugins"]
    for entry in plugins.values():
        entry["available"] = False
    for project in sorted(ROOT.glob("plugins/*/pyproject.toml")):
        metadata = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        for name, module in metadata["entry-points"][ENTRY_POINT_GROUP].items():
            plugins.setdefault(name, {}).update(available=True, distribution=metadata["name"], **_own_words(module))
    served = _model_types()
    for entry in plugins.values():
        found = set(entry.get("model_types", ())).union(*(served[namespace] for namespace in entry.get("op_namespaces", ())))
        if found:
            entry["model_types"] = sorted(found)
    return json.dumps({"format": 1, "plugins": plugins}, indent=1, sort_keys=True) + "\n"


def _own_words(module: str) -> dict[str, Any]:
    """What the plugin says of itself."""
    registry = Registry.isolated(importlib.import_module(module))
    ops = sorted(op_name(offer.item) for offer in registry.canonical_ops())
    (info,) = registry.infos
    return {"summary": info.summary, "op_namespaces": list(info.op_namespaces), "ops": ops}


def _model_types() -> dict[str, set[str]]:
    """By namespace of canonical ops, the model types that the page of what works says are served, and those of their text parts."""
    from transformers import CONFIG_MAPPING

    served: dict[str, set[str]] = defaultdict(set)
    for model_type, ops in re.findall(r"^\| ([\w-]+) \| works \| ([^|]*) \|", SUPPORT.read_text(encoding="utf-8"), re.MULTILINE):
        for namespace in re.findall(r"`(\w+)::", ops):
            served[namespace].add(model_type)
            text = CONFIG_MAPPING[model_type].sub_configs.get("text_config") if model_type in CONFIG_MAPPING else None
            if kind := getattr(text, "model_type", None):
                served[namespace].add(kind)
    return served


def main() -> int:
    """Exit status 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the file is not up to date")
    text = index()
    if parser.parse_args().check:
        if INDEX.read_text(encoding="utf-8") != text:
            print(f"{INDEX.relative_to(ROOT)} is not up to date: run python tools/gen_index.py", file=sys.stderr)
            return 1
        return 0
    INDEX.write_text(text, encoding="utf-8")
    print(f"wrote {INDEX.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
