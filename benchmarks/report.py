"""Benchmark results as a table in the README, between two markers.

    python benchmarks/report.py [--results FILE_OR_FOLDER] [--readme README.md]

takes the newest CPU result and rewrites what stands between `<!-- benchmark:start -->` and `<!-- benchmark:end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peers.tally import CASES, OURS, Case

HERE = Path(__file__).resolve().parent
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
QUIET = 0.5
"""Load for each core above which a machine is not idle. It is a mean over a minute, so what ran just before counts too."""
TITLES: Mapping[str, str] = {"ours": "ad-core", "hf": "transformers `generate`", "llama.cpp": "llama.cpp"}


class NoPlace(Exception):
    """The file has no pair of markers to write between."""


class NoResult(Exception):
    """There is no result to report."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the newest CPU benchmark result into the README.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a result, or a folder of which the newest is taken")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    arguments = parser.parse_args()
    try:
        update_readme(newest(arguments.results), arguments.readme)
    except (NoPlace, NoResult) as problem:
        sys.exit(str(problem))


def newest(results: Path) -> dict[str, Any]:
    """The CPU result that was measured last. Raises NoResult."""
    paths = [results] if results.is_file() else sorted(results.glob("*.json"))
    found = [content for content in (json.loads(path.read_text()) for path in paths) if content.get("suite") == "cpu"]
    if not found:
        raise NoResult(f"no CPU result in {results}: run `python benchmarks/cpu.py` first")
    latest: dict[str, Any] = max(found, key=lambda content: content["when"])
    return latest


def update_readme(result: Mapping[str, Any], readme: Path = HERE.parent / "README.md") -> None:
    """Replaces what stands between the markers in `readme`. Raises NoPlace if they are not there once each, in order."""
    text = readme.read_text()
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise NoPlace(f"{readme} needs the line {START} and after it the line {END}, each once; the table goes between them")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n{table(result)}\n{END}{after}")


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a caption, a row for each case and thread count, and what is absent and why."""
    peers = [engine for engine in TITLES if engine != OURS]
    header = ["", "threads", *(f"**{TITLES[e]}**" if e == OURS else TITLES[e] for e in TITLES), *(f"ad-core / {e}" for e in peers)]
    lines = [_caption(result), "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for case in CASES:
        rows = [row for row in result["rows"] if row["case"] == case.name]
        for threads in dict.fromkeys(row["threads"] for row in rows):
            of_engine = {row["engine"]: row for row in rows if row["threads"] == threads}
            values = [_value(case, of_engine.get(engine)) for engine in TITLES]
            ratios = [_ratio(of_engine.get(peer)) for peer in peers]
            lines.append(_line([f"{case.title}, {case.unit}", str(threads), *values, *ratios]))
    return "\n".join([*lines, "", _notes(result)])


def _caption(result: Mapping[str, Any]) -> str:
    hardware, software, work = result["hw"], result["sw"], result["workload"]
    dirty = " with local changes" if result["git"]["dirty"] else ""
    return (
        f"{result['model']['source'].split('.')[0]}, the same bf16 weights for all, on {hardware['ncores']} cores of {hardware['cpu']} "
        f"({', '.join(hardware['features'])}); torch {software['torch']}, transformers {software['transformers']}, "
        f"llama-cpp-python {software['llama-cpp-python']}; {result['when'][:10]}, commit {result['git']['commit']}{dirty}. "
        f"Medians of {work['rounds']} interleaved rounds (cold start: {work['cold_rounds']}) with their range; the ratios are medians "
        f"of the ratios inside each round, and above 1 ad-core is better."
    )


def _value(case: Case, row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "absent"
    digits = 0 if row["median"] >= 100 else 1
    text = f"{row['median']:,.{digits}f}"
    if row["n"] > 1:
        text += f" ({row['min']:,.{digits}f} to {row['max']:,.{digits}f})"
    if "gb_s" in row:
        text += f", {row['gb_s']:.1f} GB/s = {row['share_of_read']:.0%}"
    return text


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None or "ours_speedup" not in row:
        return ""
    ratio = row["ours_speedup"]
    return f"{ratio['median']:.2f}" if ratio["n"] == 1 else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _notes(result: Mapping[str, Any]) -> str:
    notes = []
    if (load := result["hw"]["load_before"]) > QUIET * result["hw"]["ncores"]:
        notes.append(f"**The machine was busy with other work when the run began (load {load:.1f}): these numbers are not to be trusted.**")
    if reads := result["ceilings"]["read_gb_s"]:
        shown = ", ".join(f"{read['median']:.1f} GB/s with {threads} thread{'s' * (threads != '1')}" for threads, read in reads.items())
        notes.append(f"Percentages are of the memory bandwidth measured in the same run (sum of 256 MB): {shown}.")
    if tokens := result["agreement"]["tokens"]:
        least = min(min(counts) for counts in tokens.values())
        of = result["agreement"]["of"]
        notes.append(f"On every probe prompt at least the first {least} of {of} greedy tokens of all engines are equal.")
    notes += [f"{TITLES[engine]} is absent ({reason})." for engine, reason in result["absent"].items()]
    return " ".join(notes)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
