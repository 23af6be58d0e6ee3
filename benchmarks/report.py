"""Benchmark results as tables in the README, each between two markers.

    python benchmarks/report.py [--results FILE_OR_FOLDER] [--readme README.md]

takes the newest result of each suite on the CPU and rewrites what stands between `<!-- benchmark cpu:start -->` and
`<!-- benchmark cpu:end -->`, and the same of `mixers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peers.tally import CASES, OURS, Case

HERE = Path(__file__).resolve().parent
QUIET = 0.5
"""Load for each core above which a machine is not idle. It is a mean over a minute, so what ran just before counts too."""
TITLES: Mapping[str, str] = {"ours": "ad-core", "hf": "transformers `generate`", "llama.cpp": "llama.cpp"}


class NoPlace(Exception):
    """The file has no pair of markers to write between."""


class NoResult(Exception):
    """There is no result to report."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the newest benchmark results into the README.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="a result, or a folder of which the newest is taken")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    arguments = parser.parse_args()
    try:
        for suite in TABLES:
            update_readme(newest(arguments.results, suite), arguments.readme)
    except (NoPlace, NoResult) as problem:
        sys.exit(str(problem))


def newest(results: Path, suite: str) -> dict[str, Any]:
    """The result of the suite that was measured last. Raises NoResult."""
    paths = [results] if results.is_file() else sorted(results.glob("*.json"))
    found = [content for content in (json.loads(path.read_text()) for path in paths) if content.get("suite") == suite]
    if not found:
        raise NoResult(f"no result of suite {suite} in {results}: run `python benchmarks/{suite}.py` first")
    latest: dict[str, Any] = max(found, key=lambda content: content["when"])
    return latest


def update_readme(result: Mapping[str, Any], readme: Path = HERE.parent / "README.md") -> None:
    """Replaces what stands between the markers of the result's suite. Raises NoPlace if they are not there once each, in order."""
    start, end = markers(result["suite"])
    text = readme.read_text()
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise NoPlace(f"{readme} needs the line {start} and after it the line {end}, each once; the table goes between them")
    before, rest = text.split(start)
    after = rest.split(end)[1]
    readme.write_text(f"{before}{start}\n{TABLES[result['suite']](result).strip()}\n{end}{after}")


def markers(suite: str) -> tuple[str, str]:
    return f"<!-- benchmark {suite}:start -->", f"<!-- benchmark {suite}:end -->"


def cpu_table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a caption, a row for each case and thread count, and what is absent and why."""
    peers = [engine for engine in TITLES if engine != OURS]
    header = ["", "threads", *(f"**{TITLES[e]}**" if e == OURS else TITLES[e] for e in TITLES), *(f"ad-core / {e}" for e in peers)]
    lines = [_cpu_caption(result), "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for case in CASES:
        rows = [row for row in result["rows"] if row["case"] == case.name]
        for threads in dict.fromkeys(row["threads"] for row in rows):
            of_engine = {row["engine"]: row for row in rows if row["threads"] == threads}
            values = [_value(case, of_engine.get(engine)) for engine in TITLES]
            ratios = [_ratio(of_engine.get(peer)) for peer in peers]
            lines.append(_line([f"{case.title}, {case.unit}", str(threads), *values, *ratios]))
    return "\n".join([*lines, "", _cpu_notes(result)])


def mixers_table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: a caption, a row for each model and case, and what the linear layers alone would allow."""
    lines = [
        _mixers_caption(result),
        "",
        _line(["model", "", "**ad-core**", TITLES["hf"], "ad-core / hf"]),
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, model in result["models"].items():
        title = f"{name}: {model['parameters'] / 1e6:,.0f} M, `{model['model_type']}`"
        for case in CASES:
            of_engine = {row["engine"]: row for row in model["rows"] if row["case"] == case.name}
            if of_engine:
                values = [_value(case, of_engine.get(engine)) for engine in (OURS, "hf")]
                lines.append(_line([title, f"{case.title}, {case.unit}", *values, _ratio(of_engine.get("hf"))]))
    return "\n".join([*lines, "", _mixers_notes(result)])


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"cpu": cpu_table, "mixers": mixers_table}


def _caption(result: Mapping[str, Any], what: str, *more_versions: str) -> str:
    hardware, software = result["hw"], result["sw"]
    dirty = " with local changes" if result["git"]["dirty"] else ""
    versions = ", ".join(f"{name} {software[name]}" for name in ("torch", "transformers", *more_versions))
    return (
        f"{what}, on {hardware['ncores']} cores of {hardware['cpu']} ({', '.join(hardware['features'])}); {versions}; "
        f"{result['when'][:10]}, commit {result['git']['commit']}{dirty}. "
    )


def _cpu_caption(result: Mapping[str, Any]) -> str:
    work, model = result["workload"], result["model"]["source"].split(".")[0]
    return (
        _caption(result, f"{model}, the same bf16 weights for all", "llama-cpp-python")
        + f"Medians of {work['rounds']} interleaved rounds (cold start: {work['cold_rounds']}) with their range; the ratios are medians "
        f"of the ratios inside each round, and above 1 ad-core is better."
    )


def _mixers_caption(result: Mapping[str, Any]) -> str:
    work = result["workload"]
    return (
        _caption(result, f"Random bf16 weights, {work['threads']} threads")
        + f"Medians of {work['rounds']} interleaved rounds with their range; the ratios as above."
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


def _cpu_notes(result: Mapping[str, Any]) -> str:
    notes = _busy(result)
    if reads := result["ceilings"]["read_gb_s"]:
        shown = ", ".join(f"{read['median']:.1f} GB/s with {threads} thread{'s' * (threads != '1')}" for threads, read in reads.items())
        notes.append(f"Percentages are of the memory bandwidth measured in the same run (sum of 256 MB): {shown}.")
    if tokens := result["agreement"]["tokens"]:
        least = min(min(counts) for counts in tokens.values())
        of = result["agreement"]["of"]
        notes.append(f"On every probe prompt at least the first {least} of {of} greedy tokens of all engines are equal.")
    notes += [f"{TITLES[engine]} is absent ({reason})." for engine, reason in result["absent"].items()]
    return " ".join(notes)


def _mixers_notes(result: Mapping[str, Any]) -> str:
    notes = _busy(result)
    shown = [
        f"{name} {model['ceilings']['linears_tokens_s']['median']:.1f} tokens/s, of which ad-core's decode is {row['share_of_linears']:.0%}"
        for name, model in result["models"].items()
        for row in model["rows"]
        if "share_of_linears" in row
    ]
    if shown:
        notes.append(f"If a token took the time of its linear layers alone, as torch computes them: {'; '.join(shown)}.")
    for name, model in result["models"].items():
        notes += [f"{name}: {TITLES[engine]} is absent ({reason})." for engine, reason in model["absent"].items()]
    return " ".join(notes)


def _busy(result: Mapping[str, Any]) -> list[str]:
    load = result["hw"]["load_before"]
    if load <= QUIET * result["hw"]["ncores"]:
        return []
    return [f"**The machine was busy with other work when the run began (load {load:.1f}): these numbers are not to be trusted.**"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
