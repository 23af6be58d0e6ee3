"""Somebody publishes a mixer that we have never heard of: its models run, with pages and states in one engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).with_name("third_party")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh interpreter says that finds what `pip install ad-smooth` would leave behind."""
    site = tmp_path_factory.mktemp("site")
    info = site / "ad_smooth-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ad-smooth\nVersion: 1.0\nRequires-Dist: ad-core>=0.1\n")
    (info / "entry_points.txt").write_text("[ad_core.plugins.v1]\nsmooth = smooth_plugin\n")
    path = os.pathsep.join(filter(None, (str(site), str(HERE), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(HERE / "serve.py")], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_of_averages_and_attention_answers_as_it_does_uncached(results):
    result = results["served"]
    assert result["claims"] == [
        ["mixers.0", "smooth::average", "seam smooth.library"],
        ["mixers.1", "ad_attention::attention", "matcher attention.sdpa"],
        ["mixers.2", "smooth::average", "seam smooth.library"],
        ["mixers.3", "ad_attention::attention", "matcher attention.sdpa"],
    ]
    attention = result["kernels"].pop("ad_attention::attention")
    assert attention in ("attention.softmax.native", "attention.softmax.torch")  # with and without a C compiler
    assert result["kernels"] == {"smooth::average": "smooth.loop"}
    assert result["kinds"] == ["pages", "slots"]
    assert result["verified"].startswith("structure and numbers verified")
    assert result["equal"] == [[True] * 8] * 2
    assert result["preemptions"] > 0
    # The last two begin with 40 common tokens: pages of 4 and states saved every 8 allow just that.
    assert result["reused"][-2:] == [40, 40]
    assert result["reused"][0] == 0


def test_without_the_plugin_the_model_is_refused_and_the_plugin_named(results):
    error = results["without smooth"]
    assert error["error"] == "CaptureError"
    assert "take it out of" in error["hint"]
    assert "ad-smooth" in error["hint"]


def test_without_attention_its_layers_are_refused_and_the_plugin_named(results):
    error = results["without attention"]
    assert error["error"] == "UnclaimedMixerError"
    assert "mixers.{1,3}" in error["where"]
    assert "Attend, 2 layers" in error["where"]
    assert "plugin 'attention' (ad-attention" in error["hint"]
    assert "take it out of" in error["hint"]
