"""An environment with ad-core and one mixer plugin serves what needs that one, and says what to install for the rest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Trial:
    """`plugins` are there and no others; `missing` are the distributions that the refused model lacks."""

    plugins: tuple[str, ...]
    serves: tuple[str, ...]
    ops: tuple[str, ...]
    refuses: str
    missing: tuple[str, ...]


TRIALS = [
    Trial(("attention",), ("llama",), ("ad_attention::attention",), "mamba2", ("ad-conv", "ad-mamba")),
    Trial(("mamba", "conv"), ("mamba2",), ("ad_conv::causal_conv1d", "ad_mamba::ssd"), "llama", ("ad-attention",)),
    Trial(("conv",), ("convolutions",), ("ad_conv::causal_conv1d",), "mamba", ("ad-mamba",)),
    Trial(("deltanet", "conv"), ("qwen3_5+deltas",), ("ad_conv::causal_conv1d", "ad_deltanet::gated_delta"), "qwen3_5", ("ad-attention",)),
    Trial(("linear",), ("xlstm",), ("ad_linear::mlstm",), "rwkv", ("ad-rnn",)),
    Trial(("rnn",), ("rwkv",), ("ad_rnn::token_shift", "ad_rnn::wkv4"), "recurrent_gemma", ("ad-attention", "ad-conv")),
    Trial(("attention",), ("mixtral",), ("ad_attention::attention",), "xlstm", ("ad-linear",)),
]
FAST = 2


def environment(folder: Path, plugins: tuple[str, ...]) -> str:
    """A search path that has all that is installed here but of our distributions only ad-core and the named plugins."""
    wanted = {"ad_core", *(f"ad_{name}" for name in plugins)}
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            ours = re.match(r"ad_[a-z]+", entry.name)
            if entry.suffix == ".pth" or (ours and ours[0] not in wanted) or (folder / entry.name).exists():
                continue
            (folder / entry.name).symlink_to(entry)
    sources = [str(ROOT / "plugins" / f"ad_{name}" / "src") for name in plugins]
    return os.pathsep.join(filter(None, (str(folder), str(ROOT), *sources)))


def _param(index: int, trial: Trial) -> object:
    return pytest.param(trial, id="-".join((*trial.plugins, *trial.serves)), marks=() if index < FAST else pytest.mark.slow)


@pytest.mark.parametrize("trial", [_param(index, trial) for index, trial in enumerate(TRIALS)])
def test_one_plugin_serves_its_models_and_the_others_are_named(trial, tmp_path):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": environment(tmp_path, trial.plugins), "PYTHONDONTWRITEBYTECODE": "1"}
    asked = json.dumps({"serves": trial.serves, "refuses": trial.refuses})
    command = [sys.executable, "-S", "-P", str(Path(__file__).with_name("one_plugin.py")), asked]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["plugins"] == sorted(trial.plugins)
    for served in result["served"]:
        assert served == {"ops": list(trial.ops), "equal": [True, True]}
    error = result["refused"]
    assert error["error"] in ("UnclaimedMixerError", "CaptureError")
    lines = re.findall(r"(\S+) -m pip install -U (\S+)   \(", error["hint"])
    assert lines == [(sys.executable, name) for name in trial.missing]
