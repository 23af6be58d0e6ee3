"""Ours, transformers `generate` and llama.cpp on the same bf16 weights, interleaved in one run on this machine's CPU.

    python benchmarks/cpu.py [--threads 1 2] [--rounds 5] [--model PATH.gguf] [--out FILE.json]

Without `--out` the run is recorded: a new JSON in benchmarks/results/ and the table of the README. With it nothing else is touched.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from peers.client import BENCHMARKS
from peers.contest import AGREED_AT_LEAST, ENGINES, PROBE_TOKENS, SHORT, Contest, Findings, Workload
from peers.record import git, hardware, new_path, versions
from peers.tally import BY_NAME, CASES, OURS, Target, judge, rows, spread

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "AD_BENCHMARK_MODEL"
"""Environment variable with the path of the GGUF, where neither the option nor .weights/ has it."""

PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "ad-core", "ad-attention", "ad-fusion")
TARGETS = (
    Target("decode", 1, 1.1, "hf"),
    Target("decode", 2, 1.2, "hf"),
    *(Target("concurrent", threads, 2.0, "hf") for threads in (1, 2)),
    *(Target("prefill", threads, 1.0, "hf") for threads in (1, 2)),
    *(Target("cold", threads, 15.0) for threads in (1, 2)),
)
"""Printed as passed or missed and kept in the JSON; never a test, since timings on a shared machine are not one."""


def main() -> None:
    arguments = _parse()
    workload = SHORT if arguments.short else Workload()
    findings = Findings()
    load_before = os.getloadavg()[0]
    if load_before > report.QUIET * (os.cpu_count() or 1):
        print(f"other programs are running (load {load_before:.1f}): the numbers will not be worth much", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="ad-benchmark-") as temporary:
        model = arguments.work or Path(temporary)
        manifest = _prepare(arguments.model, model)
        for threads in arguments.threads:
            contest = Contest(model, manifest, threads, workload, findings, say=lambda line: print(line, file=sys.stderr, flush=True))
            contest.run(arguments.cases, arguments.rounds, arguments.cold_rounds)
    result = _document(findings, manifest, workload, arguments, load_before)
    path = arguments.out or new_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    _show(result, path)
    if arguments.out is None:
        try:
            report.update_readme(result)
        except report.NoPlace as problem:  # the measurement is kept, the table can be written later
            sys.exit(str(problem))


def _parse() -> argparse.Namespace:
    names = [case.name for case in CASES if case.name != "memory"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--model", type=Path, default=_default_model(), help="a GGUF file (default: the one `make demo` fetches)")
    parser.add_argument("--out", type=Path, help="write here only; leave the README and benchmarks/results/ alone")
    parser.add_argument("--work", type=Path, help="keep the rewritten weights in this folder and use them again")
    parser.add_argument("--short", action="store_true", help="few tokens, to try the benchmark out: the numbers mean nothing (needs --out)")
    arguments = parser.parse_args()
    if arguments.short and arguments.out is None:
        parser.error("--short needs --out: its numbers must not reach the README")
    if not arguments.model.is_file():
        parser.error(f"{arguments.model} is no file; give --model, set {WEIGHTS}, or run `make demo` once, which fetches it")
    return arguments


def _default_model() -> Path:
    fetched = sorted((BENCHMARKS.parent / ".weights").rglob(DEFAULT_MODEL))
    return Path(os.environ.get(WEIGHTS) or (fetched[0] if fetched else BENCHMARKS.parent / ".weights" / DEFAULT_MODEL))


def _prepare(source: Path, target: Path) -> dict[str, Any]:
    """The manifest of the rewritten weights, made by a process of its own unless `target` has them. Ends the run if that fails."""
    manifest = target / "manifest.json"
    if not manifest.exists():
        print(f"rewriting {source.name} as bf16 for all engines ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "peers.prepare", str(source.resolve()), str(target.resolve())]
        done = subprocess.run(command, cwd=BENCHMARKS, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{source} could not be rewritten:\n{done.stderr}")
    content: dict[str, Any] = json.loads(manifest.read_text())
    return content


def _document(
    findings: Findings, manifest: dict[str, Any], workload: Workload, arguments: argparse.Namespace, load_before: float
) -> dict[str, Any]:
    measured = rows(findings.samples)
    reads = {threads: spread(values) for threads, values in findings.read_gb_s.items()}
    bytes_per_token = manifest["weight_bytes_per_token"] + manifest["kv_bytes_per_context_token"] * (workload.prompt + workload.new / 2)
    for row in measured:
        if row["case"] == "decode" and row["threads"] in reads:
            row["gb_s"] = row["median"] * bytes_per_token / 1e9
            row["share_of_read"] = row["gb_s"] / reads[row["threads"]]["median"]
    wished = [target for target in TARGETS if target.threads in arguments.threads and target.case in arguments.cases]
    return {
        "schema": 1,
        "suite": "cpu",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git(),
        "hw": hardware() | {"load_before": round(load_before, 2)},
        "sw": {"python": platform.python_version()} | versions(*PACKAGES),
        "model": {"source": manifest["source"], "dtype": "bf16", "tensors_compared": manifest["tensors_compared"]},
        "workload": asdict(workload) | {"rounds": arguments.rounds, "cold_rounds": arguments.cold_rounds},
        "engines": findings.engines,
        "absent": findings.absent,
        "agreement": {"of": PROBE_TOKENS, "needed": AGREED_AT_LEAST, "tokens": findings.agreed},
        "ceilings": {"read_gb_s": {str(threads): read for threads, read in reads.items()}, "bytes_per_token": round(bytes_per_token)},
        "rows": measured,
        "targets": [judge(target, measured) for target in wished],
        "phases": {str(threads): phases for threads, phases in findings.phases.items()},
    }


def _show(result: dict[str, Any], path: Path) -> None:
    print(report.cpu_table(result))
    for engine, counts in result["agreement"]["tokens"].items():
        print(f"greedy tokens equal to the reference's: {engine} {counts} of {PROBE_TOKENS}")
    for threads, phases in result["phases"].items():
        print(f"cold start, {threads} threads: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items()))
    for target in result["targets"]:
        verdict = {True: "passed", False: "MISSED", None: "not measured"}[target["passed"]]
        value = "" if target["value"] is None else f"{target['value']:.2f}"
        print(f"target {BY_NAME[target['case']].title}, {target['threads']} threads, {target['wish']}: {value} {verdict}")
    if OURS in result["absent"]:
        print(f"our own engine has no numbers: {result['absent'][OURS]}")
    print(f"written to {path}; engines: {', '.join(ENGINES)}")


if __name__ == "__main__":
    main()
