"""Models of the size that people run, captured without their weights: `big.json` names them, `measure` says what capture costs."""

from __future__ import annotations

import copy
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ad_core.config import make_config
from ad_core.pipeline import outline
from ad_core.plan import Plan

PATH = Path(__file__).with_name("big.json")


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Those that transformers knows, by name: `model_type`, and in `config` what differs from the type's defaults."""
    read = json.loads(PATH.read_text())
    return {name: entry for name, entry in read.items() if isinstance(entry, dict) and entry["model_type"] is not None}


def plan_of(model_type: str, config: dict[str, Any]) -> Plan:
    """The plan of a model in bfloat16 that is on meta from end to end: its directory holds a configuration and no tensor."""
    from transformers import CONFIG_MAPPING

    with tempfile.TemporaryDirectory() as folder:
        described = CONFIG_MAPPING[model_type](**copy.deepcopy(config))
        described.dtype = torch.bfloat16
        described.save_pretrained(folder)
        save_file({}, Path(folder) / "model.safetensors")
        unbounded = getattr(described, "max_position_embeddings", None) is None  # a recurrence may go on for ever
        return outline(folder, make_config({"max_model_len": 4096} if unbounded else {}))


def measure(model_type: str, config: dict[str, Any]) -> dict[str, Any]:
    """What `plan_of` costs and finds. Memory is the peak of this whole process, in bytes: use a process for each."""
    wall, cpu = time.perf_counter(), time.process_time()
    plan = plan_of(model_type, config)
    served: Counter[str] = Counter()
    for decision in plan.decisions:
        if decision.rule != "match":
            served[decision.subject] += len(decision.members) or 1
    return {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "parameters": plan.model["parameters"],
        "nodes": plan.nodes,
        "ops": dict(sorted(served.items())),
    }
