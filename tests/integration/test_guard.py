"""Every pass held against the graph before it, through to the end: packed weights, experts and fusions among them."""

from __future__ import annotations

import pytest
import torch

import ad_core
from tests.zoo.models import build, entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "qwen3_moe", "bamba"])
def test_no_pass_changes_a_models_numbers(kind, dtype):
    compiled = ad_core.compile(build(entries()[kind]).to(dtype), max_model_len=64, verify=True)
    said = {report.name: report.guard for report in compiled.plan.passes if report.matched}
    assert said.keys() & {"core.clean", "core.duplicates", "core.prepack", "fusion.norms"}
    late = [line for name, line in said.items() if name.startswith(("core.prepack", "fusion."))]
    assert all(line.startswith("differs by") for line in late), said
