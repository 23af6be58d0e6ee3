"""How much memory it takes to open, capture, load and run a model of a billion parameters. Slow: writes 2.5 GB to disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

CHILD = """
import json, sys
import torch, ad_attention.plugin
import transformers.models.llama.modeling_llama, transformers.conversion_mapping, torch.export._trace, torch._dynamo
from ad_core.capture import capture, load_weights, open_model
from ad_core.plan import Plan
from ad_core.registry import isolated

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

registry, before = isolated(ad_attention.plugin), resident("VmRSS")
source = open_model(sys.argv[1], dtype="bfloat16")
captured = capture(source, plan=Plan(), seams=registry.seams(), ops=["ad_attention::attention"])
opened = resident("VmHWM") - before
held = load_weights(captured.graph, source, "cpu")
peak = resident("VmHWM") - before
ids = torch.arange(8)[None]
with torch.no_grad():
    assert captured.graph(ids, ids).isfinite().all()
print(json.dumps({"opened": opened, "held": held, "peak": peak, "numbers": captured.numbers}))
"""


def write_checkpoint(folder: Path, dtype: torch.dtype) -> None:
    """1.24 billion random parameters, tied, in parts."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items() if name != "lm_head.weight"
        }
    config.save_pretrained(folder)
    index, part = {}, {}
    generator = torch.Generator().manual_seed(0)

    def flush():
        if part:
            file = f"model-{len(set(index.values())) + 1:05}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(part, file))
            part.clear()

    for name, shape in shapes.items():
        block = torch.randn(1 << 16, generator=generator) * 0.02
        part[name] = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].reshape(shape).to(dtype)
        if sum(tensor.nbytes for tensor in part.values()) > 1 << 28:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_loading_takes_little_more_than_the_weights(stored, tmp_path):
    write_checkpoint(tmp_path, stored)
    done = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["held"] == pytest.approx(2 * 1_235_814_400, rel=0.01)
    assert not found["numbers"]  # more than the limit: nothing is loaded to compare
    assert found["opened"] < 0.1 * found["held"]
    assert found["peak"] <= 1.15 * found["held"], found


ENGINE = """
import json, sys
import torch, ad_attention.plugin
import transformers.models.llama.modeling_llama, transformers.conversion_mapping, torch.export._trace, torch._dynamo
from ad_core import LLM, SamplingParams

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

before = resident("VmRSS")
with LLM(sys.argv[1], dtype="bfloat16", memory="512MiB", max_batch_tokens=512, max_requests=8) as llm:
    (output,) = llm.generate([list(range(5, 600))], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 4
    print(json.dumps({"printed": dict(llm.plan.memory), "peak": resident("VmHWM") - before, "now": resident("VmRSS") - before}))
"""


@pytest.mark.slow
def test_the_memory_that_is_printed_is_the_memory_that_is_taken(tmp_path):
    write_checkpoint(tmp_path, torch.bfloat16)
    done = subprocess.run([sys.executable, "-c", ENGINE, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] == pytest.approx(found["printed"]["total"], rel=0.15), found
