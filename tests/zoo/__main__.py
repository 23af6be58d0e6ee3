"""`python -m tests.zoo`: runs entries of the zoo and writes the page of what works.

python -m tests.zoo --page docs/support.md        everything
python -m tests.zoo llama bamba                   two of them, printed
python -m tests.zoo --failed --json results.json  what did not pass the last time; the file keeps the results of all
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .models import entries
from .page import page
from .pool import run_all


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description="Runs the zoo of tiny models.")
    parser.add_argument("types", nargs="*", help="model types; all if none is named")
    parser.add_argument("--failed", action="store_true", help="only those without a pass in --json")
    parser.add_argument("--json", type=Path, help="results by type; what is there is kept unless it is run again")
    parser.add_argument("--page", type=Path, help="where to write the table")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds an entry may take")
    options = parser.parse_args()
    known = entries()
    if unknown := sorted(set(options.types) - known.keys()):
        parser.error(f"not in the zoo: {', '.join(unknown)}")
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    wanted = options.types or list(known)
    if options.failed:
        wanted = [name for name in wanted if results.get(name, {}).get("status") != "pass"]
    lock = threading.Lock()

    def report(result: Mapping[str, Any]) -> None:
        with lock:
            results[result["model_type"]] = result
            print(f"{result['model_type']:28} {result['status']:5} {result.get('seconds', 0):6.1f} s ", end="")
            print(f"{result['stage']}: {result['reason'][:400]}" if result["stage"] else "", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, sort_keys=True))
            if options.page:
                options.page.write_text(page(known, results, _versions()))

    run_all(wanted, options.jobs, options.limit, report)
    passed = sum(results[name]["status"] == "pass" for name in wanted)
    print(f"{passed} of {len(wanted)} pass")


def _versions() -> str:
    from importlib.metadata import version

    return f"transformers {version('transformers')} and torch {version('torch').partition('+')[0]}"


if __name__ == "__main__":
    main()
