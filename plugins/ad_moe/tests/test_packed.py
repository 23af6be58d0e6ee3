"""Packed weights: the same experts, whichever way their weights lay before; and what was packed is gone."""

from __future__ import annotations

import pytest
import torch

from ad_core import LLM, SamplingParams
from ad_core.native.packed import pack, packed_bytes, why_not_packed
from ad_moe.kernels.packed_moe import moe_packed
from ad_moe.testing import CASES

from .models import plain
from .oracle import experts

REASON = why_not_packed(torch.zeros(4, 4, dtype=torch.bfloat16))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLAGS = {"up": "up_transposed", "gate": "up_transposed", "down": "down_transposed"}


@pytest.mark.parametrize("entry", CASES, ids=lambda entry: entry.name)
@pytest.mark.parametrize("length", [1, 40])
def test_a_packed_call_is_the_canonical_op(entry, length):
    given = entry.arguments(1, length, torch.bfloat16)
    defaults = {a.name: a.default_value for a in torch.ops.ad_moe.moe.default._schema.arguments if a.has_default_value()}
    arguments, widths = {**defaults, **given}, {}
    for name, flag in FLAGS.items():
        if arguments[name] is None:
            continue
        weight = arguments[name].transpose(1, 2) if arguments[flag] else arguments[name]
        if reason := why_not_packed(weight):
            pytest.skip(reason)
        widths[name] = weight.shape[1]
        arguments[name] = pack(weight, torch.empty(packed_bytes(weight), dtype=torch.uint8))
    for name in ("up_bias", "down_bias"):
        if arguments[name] is not None:  # a view of something wider
            arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    names = [a.name for a in moe_packed._schema.arguments][2:]
    result = moe_packed(widths["up"], widths["down"], *(arguments[name] for name in names))
    truth = experts(given)
    assert float((result.double() - truth).abs().max()) <= entry.tolerance[torch.bfloat16] * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_model_in_bfloat16_is_served_with_packed_experts(kind, tmp_path):
    module = plain(kind).to(torch.bfloat16)
    module.config.dtype = torch.bfloat16
    module.save_pretrained(tmp_path)
    exact = module.float()
    with LLM(str(tmp_path), max_batch_tokens=16, max_requests=4, memory="2MiB", max_model_len=64, dtype="bfloat16") as llm:
        (packing,) = [each for each in llm.plan.passes if each.name == "moe.pack_experts"]
        assert packing.matched == module.config.num_hidden_layers
        assert not packing.declined
        prompts = [[5], list(range(9)), list(range(33))]
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))
        for prompt, output in zip(prompts, outputs, strict=True):
            wanted = exact(torch.tensor([prompt]), use_cache=False).logits[0, -1].detach().log_softmax(0)
            found = output.outputs[0].logprobs[0]
            assert max(abs(value - float(wanted[index])) for index, value in found.items()) < 0.15
