"""A hybrid outside of transformers, from a directory with its own code and from memory: the example that is the tutorial for it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ad_core import LLM
from ad_core.api.errors import UnclaimedMixerError

EXAMPLE = Path(__file__).parents[2] / "examples" / "nemotron_flash_like"


@pytest.fixture(scope="module")
def flash() -> ModuleType:
    """The author's file."""
    spec = importlib.util.spec_from_file_location("own_flash", EXAMPLE / "flash.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["own_flash"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pairs", [3, pytest.param(18, marks=pytest.mark.slow)])
def test_the_example_answers_both_ways_as_full_recompute_does(pairs, tmp_path):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, str(EXAMPLE / "generate.py"), "--pairs", str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 of 40 tokens were in the cache" in done.stdout
    assert f"{pairs // 2} x ad_mamba::ssd, seam mamba.chunk_scan_combined" in done.stdout
    assert "x ad_deltanet::gated_delta, seam deltanet.chunk_gated_delta_rule" in done.stdout
    assert "x ad_attention::attention, matcher attention.sdpa" in done.stdout


def test_the_author_knows_nothing_of_us():
    for name in ("flash.py", "modeling_flash.py"):
        text = (EXAMPLE / name).read_text()
        assert "ad_core" not in text
        assert "torch.ops" not in text


def test_the_layer_pattern_is_that_of_the_shape_it_is_named_after(flash):
    assert len(flash.PATTERN) == 18
    assert flash.PATTERN[1::2] == ("mamba2",) * 9
    assert [index for index, kind in enumerate(flash.PATTERN) if kind == "attention"] == [2, 6, 10]
    assert flash.PATTERN.count("deltanet") == 6


def test_meta_tokens_in_front_of_the_ids_give_the_same_logits_and_are_refused_with_the_reason(flash):
    class InFront(flash.Flash):  # type: ignore[name-defined, misc]
        def forward(self, input_ids):
            x = torch.cat([self.meta.weight.expand(input_ids.shape[0], -1, -1), self.tokens(input_ids)], 1)
            positions = torch.arange(x.shape[1]).expand(x.shape[0], -1)
            for block in self.blocks:
                x = block(x, positions)
            return self.head(self.norm(x[:, self.num_meta :]))

    torch.manual_seed(1)
    model = InFront(pattern=["attention"]).eval().requires_grad_(False)
    ids = torch.tensor([[5, 6, 7, 8]])
    placed = torch.cat([torch.zeros(1, model.num_meta, dtype=torch.int64), ids], 1)
    torch.testing.assert_close(model(ids), flash.Flash.forward(model, placed)[:, model.num_meta :])
    with pytest.raises(UnclaimedMixerError, match="puts something before or after the tokens"):
        LLM(model, max_model_len=64, memory="1MiB")
