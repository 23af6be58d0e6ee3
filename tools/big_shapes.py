"""Captures the shapes of tests/zoo/big.json on the meta device, one process each, and says what that costs.

python tools/big_shapes.py                               all of them
python tools/big_shapes.py deepseek-v3                   one
python tools/big_shapes.py --page docs/big-shapes.md     and writes the table
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo.big import measure, shapes  # noqa: E402  (a script sees only its own folder)

_HEAD = """# What capture of large models costs

Each model of `tests/zoo/big.json` is captured with its real shapes in bfloat16 on the meta device: no weight is read and none has
memory. What is measured is everything from the directory to the graph with its caches inserted, as in `ad explain`: seconds of one
processor, and the peak memory of the process, of which torch and transformers take a good part. Equal layers
are traced once.

`python tools/big_shapes.py --page docs/big-shapes.md` writes this page.
"""


def main() -> int:
    """Exit status 1 if a shape was not captured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="shapes; all if none is named")
    parser.add_argument("--page", type=Path, help="where to write the table")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds on the clock that a shape may take")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - shapes().keys()):
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(shapes())}")
    if options.one:
        print(json.dumps(_here(options.names[0])))
        return 0
    results = {}
    for name in options.names or shapes():
        results[name] = _apart(name, options.limit)
        print(_row(name, results[name]), flush=True)
        if options.page:
            options.page.write_text(_page(results), encoding="utf-8")
    return int(any("error" in result for result in results.values()))


def _here(name: str) -> dict[str, Any]:
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    return measure(**{key: shapes()[name][key] for key in ("model_type", "config")})


def _apart(name: str, limit: float) -> dict[str, Any]:
    """The result of a shape from a process of its own, or its error."""
    command = [sys.executable, __file__, "--one", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"error": " ".join(done.stderr.split())[-400:] or f"its process ended with status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _row(name: str, result: Mapping[str, Any]) -> str:
    kind = shapes()[name]["model_type"]
    if "error" in result:
        return f"| {name} | {kind} | - | - | - | - | {result['error'].replace('|', '/')} |"
    ops = ", ".join(f"`{op}` x {count}" for op, count in result["ops"].items())
    cells = (
        f"{result['parameters'] / 1e9:,.1f}",
        f"{result['cpu_seconds']:.1f}",
        f"{result['peak_bytes'] / 1e6:,.0f}",
        f"{result['nodes']:,}",
        ops,
    )
    return f"| {name} | {kind} | {' | '.join(cells)} |"


def _page(results: Mapping[str, Mapping[str, Any]]) -> str:
    from importlib.metadata import version

    versions = f"transformers {version('transformers')} and torch {version('torch').partition('+')[0]}"
    rows = [_row(name, result) for name, result in results.items()]
    header = (
        "| model | type | parameters, G | seconds | memory, MB | nodes | canonical ops that have a kernel, or why not |",
        "|---|---|---:|---:|---:|---:|---|",
    )
    return "\n".join((_HEAD, f"With {versions}, one thread.", "", *header, *rows, ""))


if __name__ == "__main__":
    sys.exit(main())
