"""Models of transformers through the engine: in chunks, side by side, with states; the answer is the original module's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ad_core import LLM, SamplingParams

from .tiny import CONFIGS, ids, oracle, tiny

LENGTH = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
OPTIONS = {"max_batch_tokens": 8, "page_size": 4, "max_requests": 4, "max_model_len": 128, "memory": "8MiB", "checkpoint_interval": 16}
TIE = 1e-3
"""Where the oracle's two best logits are closer than this, either token is right."""

CLAIMS = {
    "mamba": {"scan": 2, "conv": 2},
    "falcon_mamba": {"scan": 2, "conv": 2},
    "mamba2": {"ssd": 2, "conv": 2},
    "bamba": {"ssd": 2, "conv": 2, "attention": 1},
    "falcon_h1": {"ssd": 2, "conv": 2, "attention": 2},
    "granitemoehybrid": {"ssd": 2, "conv": 2, "attention": 1},
    "nemotron_h": {"ssd": 1, "conv": 1, "attention": 1},
    "jamba": {"scan": 2, "conv": 2, "attention": 2},
    "zamba": {"scan": 8, "conv": 4, "attention": 2},
    "zamba2": {"ssd": 4, "conv": 4, "attention": 2},
    "lfm2": {"conv": 2, "attention": 1},
}
"""Calls of the canonical ops in the graph: the mixers of the configuration, counted by hand. Zamba's Mamba has two heads, each a scan."""
OPS = {"ad_mamba::selective_scan": "scan", "ad_mamba::ssd": "ssd", "ad_conv::causal_conv1d": "conv", "ad_attention::attention": "attention"}
FAST = ("mamba", "mamba2")


@dataclass(frozen=True)
class Served:
    kind: str
    module: nn.Module
    llm: LLM


@pytest.fixture(scope="module", params=[kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    module = tiny(request.param)
    with LLM(module, **OPTIONS) as llm:
        yield Served(request.param, module, llm)


def check(served: Served, prompts: list[list[int]]) -> None:
    """Every token is the choice of the original module over the whole sequence, without a cache."""
    for output in served.llm.generate(prompts, GREEDY):
        assert output.error is None, output.error
        answer = output.outputs[0].token_ids
        assert len(answer) == LENGTH
        logits = oracle(served.module, output.prompt_token_ids, answer)
        behind = logits.amax(1) - logits[torch.arange(LENGTH), torch.tensor(answer)]
        assert float(behind.max()) <= TIE, f"token {int(behind.argmax())} behind a prompt of {len(output.prompt_token_ids)}"


def test_ragged_prompts_in_chunks_give_the_tokens_of_full_recompute(served: Served) -> None:
    check(served, [ids(1), ids(9), ids(33)])
    served.llm._engine.cache.audit()


def test_every_mixer_is_claimed_and_the_numbers_were_compared(served: Served) -> None:
    plan = served.llm.plan
    counted = Counter(OPS[claim.op] for claim in plan.claims if claim.op in OPS)
    assert counted == CLAIMS[served.kind]
    assert plan.attempts[0].way == "seams"
    assert plan.attempts[0].accepted
    assert plan.attempts[0].reason.startswith("structure and numbers verified")


def test_a_prefix_is_restored_from_its_checkpoint(served: Served) -> None:
    """The second prompt shares 38 tokens with the first: the states at 32 are copied back, and the answer is the same as without."""
    shared = ids(38, seed=7)
    check(served, [shared + ids(5, seed=1)])
    before = served.llm.stats.reused_tokens
    check(served, [shared + ids(6, seed=2)])
    assert served.llm.stats.reused_tokens - before == 32
