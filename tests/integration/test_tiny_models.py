"""One model of each kind of attention, from a directory on disk to tokens: what the engine answers is what the model says."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from torch import nn

from ad_core import LLM, SamplingParams

from ..zoo_models import CONFIGS, WINDOWED, ids, tiny
from .oracle import check_greedy

LENGTH = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


@dataclass(frozen=True)
class Served:
    """A model that transformers wrote to disk, and an engine that read it from there."""

    kind: str
    module: nn.Module
    llm: LLM


SLOW = ("opt", "qwen3", "mpt")
"""Their attention is like that of another in the list, so they are left to the long run."""
EXPERTS = ("mixtral", "gpt_oss", "llama4_text")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in CONFIGS])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    module = tiny(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    module.save_pretrained(folder)
    with LLM(folder, max_batch_tokens=8, page_size=4, max_requests=4, max_model_len=128, memory="2MiB") as llm:
        yield Served(request.param, module, llm)


def test_ragged_prompts_in_chunks_over_small_pages_give_the_tokens_of_full_recompute(served):
    outputs = served.llm.generate([ids(1), ids(9), ids(33)], GREEDY)
    assert check_greedy(served.module, served.llm, outputs, LENGTH) <= 1
    assert served.llm.stats.preemptions == 0
    served.llm._engine.cache.audit()


def test_every_layer_is_claimed_and_its_numbers_were_compared(served):
    plan = served.llm.plan
    experts = {} if served.kind not in EXPERTS else {"ad_moe::moe": 2}
    assert Counter(claim.op for claim in plan.claims) == {"ad_attention::attention": 2, **experts}
    assert plan.attempts[-1].accepted
    assert plan.attempts[-1].reason.startswith("structure and numbers verified")


def test_pages_that_left_their_window_come_back_while_the_sequence_runs(served):
    if served.kind not in WINDOWED:
        pytest.skip("the model has no window")
    cache = served.llm._engine.cache
    assert cache.windows == (None, 8)
    owned, finished = [], threading.Event()

    def look(output):  # in the engine's thread, between two steps
        owned.append([group.num_owned for group in cache.groups])
        if output.finished:
            finished.set()

    served.llm.submit(ids(70, seed=3), SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True), sink=look)
    assert finished.wait(60)
    assert max(full for full, _ in owned) == 30, "119 computed tokens are 30 pages of 4"
    # A window of 8 lies on at most 3 pages, and the next token may need one more.
    assert max(windowed for _, windowed in owned) <= 4
    assert owned[-1] == [0, 0]
    cache.audit()
