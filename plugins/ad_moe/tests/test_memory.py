"""What loading a model with many experts takes beside its weights. Slow: writes half a gigabyte to disk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from .models import plain

CHILD = """
import json, sys, threading, time
import torch, transformers.models.qwen3_moe.modeling_qwen3_moe, transformers.conversion_mapping, transformers.core_model_loading
from ad_core.capture import open_model

def held():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

source = open_model(sys.argv[1])
before, most, done = held(), [0], threading.Event()

def watch():
    while not done.is_set():
        most[0] = max(most[0], held())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
weights = source.weights("cpu")
done.set()
watcher.join()
print(json.dumps({"weights": source.nbytes, "peak": most[0] - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stacking_experts_takes_no_second_copy_of_them(tmp_path):
    torch.manual_seed(0)
    module = plain("qwen3_moe", hidden_size=512, moe_intermediate_size=640, num_experts=128, num_experts_per_tok=4).to(torch.bfloat16)
    module.config.dtype = torch.bfloat16
    module.save_pretrained(tmp_path)
    del module
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 480 << 20
    # A layer's stack of gates and ups is 160 MiB: with it there twice this would be far off.
    assert found["peak"] - found["weights"] < 24 << 20, found
