"""Whole models of transformers with routed experts: captured through the seam, and answering as full recompute does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import ad_core
from ad_core import LLM, SamplingParams

from .models import CONFIGS, ids, logits_of, tiny

FAST = ("mixtral", "qwen3_moe", "gpt_oss")
LENGTH = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
TIE = 1e-3
"""Where the oracle's two best logits are closer than this, either token is right."""

KINDS = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in CONFIGS]


def engine(model: nn.Module | Path) -> LLM:
    """Chunks of 8 tokens over pages of 4."""
    return LLM(model, max_batch_tokens=8, page_size=4, max_requests=4, max_model_len=128, memory="2MiB", allow_plugins=["attention", "moe"])


def check_answers(module: nn.Module, llm: LLM) -> None:
    """Every token is the oracle's choice behind what stands before it, which one forward over prompt and answer tells."""
    for output in llm.generate([ids(1), ids(9), ids(33)], GREEDY):
        assert output.error is None, output.error
        answer, prompt = output.outputs[0].token_ids, output.prompt_token_ids
        assert len(answer) == LENGTH
        logits = logits_of(module, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
        behind = logits.amax(1) - logits[torch.arange(LENGTH), torch.tensor(answer)]
        assert float(behind.max()) <= TIE, f"prompt of {len(prompt)}: token {int(behind.argmax())} is {float(behind.max()):.3g} behind"


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(kind):
    module = tiny(kind)
    with engine(module) as llm:
        found = Counter(claim.op for claim in llm.plan.claims)
        assert found["ad_moe::moe"] >= 1
        assert llm.plan.attempts[0].accepted, llm.plan.attempts
        check_answers(module, llm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_disk_gives_the_modules_logits(kind, tmp_path):
    """Experts are stored one by one, under names that are not the module's."""
    module = tiny(kind)
    module.save_pretrained(tmp_path)
    prompt = torch.tensor([ids(33)])
    compiled = ad_core.compile(tmp_path, verify=False, allow_plugins=["attention", "moe"])
    wanted = logits_of(module, prompt[0].tolist())
    torch.testing.assert_close(compiled(prompt)[0], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
