"""Ours and transformers `generate` on models of other mixers: a Mamba-2, a hybrid with attention, routed experts. The weights are random.

    python benchmarks/mixers.py [--shapes mamba2 hybrid experts] [--threads 2] [--rounds 3] [--out FILE.json]

Without `--out` the run is recorded: a new JSON in benchmarks/results/ and the second table of the README. Random weights say nothing
about quality, and the greedy tokens of two engines part early: the first token behind each probe must agree, and the result says how
many do.
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
from statistics import median
from typing import Any

import report
from peers.client import BENCHMARKS
from peers.contest import PROBE_TOKENS, Contest, Findings, Workload
from peers.record import git, hardware, new_path, versions
from peers.tally import BY_NAME, OURS, Target, judge, rows, spread

ENGINES = {"ours": "ours", "hf": "hf_generate"}
CASES = ("decode", "prefill", "concurrent")
PACKAGES = ("torch", "transformers", "ad-core", "ad-attention", "ad-conv", "ad-mamba", "ad-moe", "ad-fusion")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": (
        "mamba2",
        {
            **{"vocab_size": 50288, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 128, "expand": 2, "head_dim": 64},
            **{"num_heads": 24, "n_groups": 1, "chunk_size": 256, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        },
    ),
    "hybrid": (
        "bamba",
        {
            **{"vocab_size": 50288, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "attn_layer_indices": [3, 9]},
            **{"num_attention_heads": 12, "num_key_value_heads": 4, "mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128},
            **{"mamba_n_groups": 1, "mamba_expand": 2, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        },
    ),
    "experts": (
        "qwen3_moe",
        {
            **{"vocab_size": 50288, "hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 12, "num_experts": 32},
            **{"num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024},
            **{"tie_word_embeddings": True, "max_position_embeddings": 2048, "mlp_only_layers": [], "decoder_sparse_step": 1},
        },
    ),
}
"""About 130, 170 and 200 million parameters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, help="write here only")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    models = {name: _measure(name, arguments) for name in arguments.shapes}
    result = {
        "schema": 1,
        "suite": "mixers",
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": git(),
        "hw": hardware() | {"load_before": round(load_before, 2)},
        "sw": {"python": platform.python_version()} | versions(*PACKAGES),
        "workload": asdict(Workload()) | {"rounds": arguments.rounds, "threads": arguments.threads},
        "models": models,
    }
    path = arguments.out or new_path(result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(report.mixers_table(result))
    print(f"written to {path}")
    if arguments.out is None:
        try:
            report.update_readme(result)
        except report.NoPlace as problem:  # the measurement is kept, the table can be written later
            sys.exit(str(problem))


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    kind, config = SHAPES[name]
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="ad-benchmark-") as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "peers.random_weights", temporary, kind, json.dumps(config)], cwd=BENCHMARKS, check=True)
        manifest = json.loads((folder / "manifest.json").read_text())

        def say(line: str) -> None:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

        contest = Contest(folder, manifest, arguments.threads, Workload(), findings, say, ENGINES, agreed_at_least=1)
        contest.run(arguments.cases, arguments.rounds, 0)
    measured = rows(findings.samples)
    decode = 1.8 if name == "mamba2" else 1.5
    targets = [
        judge(Target(case, arguments.threads, limit, "hf"), measured)
        for case, limit in (("decode", decode), ("concurrent", 4.0), ("prefill", 2.0))
        if case in arguments.cases
    ]
    for target in targets:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        print(f"{name}: {BY_NAME[target['case']].title}: {value} ({target['wish']})")
    alone = findings.linears_tokens_s.get(arguments.threads)
    for row in measured:
        if alone and (row["case"], row["engine"]) == ("decode", OURS):
            row["share_of_linears"] = row["median"] / median(alone)
    return {
        "model_type": kind,
        "config": config,
        "parameters": manifest["parameters"],
        "agreement": {"of": PROBE_TOKENS, "tokens": findings.agreed},
        "absent": findings.absent,
        "ceilings": {"linears_tokens_s": alone and spread(alone)},
        "rows": measured,
        "targets": targets,
    }


if __name__ == "__main__":
    main()
