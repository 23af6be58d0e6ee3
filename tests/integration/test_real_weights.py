"""Real weights: whatever the engine does with a step, the tokens are those of the uncached model."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ad_core import LLM, SamplingParams
from ad_core.llm import RequestOutput
from ad_core.registry import Registry

from .oracle import check_greedy

TEXT = """The harbour lay still in the grey light before dawn, and the boats knocked softly against the quay. Anna had not slept. She
had counted the bells, first from the church on the hill and then from the ship that waited beyond the breakwater, and with each of
them she had told herself that there was still time. Now there was none. A man came down the steps with a lantern and a coil of rope,
looked at her, and said nothing. In 1897 the railway had reached the town; by 1903 it had taken most of the trade away (nearly 60% of
it, her father used to say), and what was left was fish, salt, and letters. def price(x): return 3 * x + 1. "You are early," the man
said at last. "The captain sails at seven, not before." She gave him the envelope and did not answer. There were three things in it: a
photograph, a key, and a list of names that nobody was meant to read. Far out, the first gulls began to cry over the dark water."""

LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 150, 200)
"""Tokens of the prompts: single ones, around powers of two, and several chunks."""
SHARED = 70
"""Tokens that the prompts of the prefix test have in common: four pages of 16 and a rest."""


@dataclass(frozen=True)
class Model:
    """transformers' own module with the file's weights (the oracle), and prompts for it."""

    path: Path
    module: nn.Module
    prompts: list[list[int]]
    related: list[list[int]]
    """Prompts that begin alike."""


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    from ad_core.capture import open_model

    source = open_model(smollm2, loaders=Registry.load().loaders(), dtype="float32")
    module = source.runnable("cpu")
    tokens = source.tokenizer()(TEXT)["input_ids"]
    assert len(tokens) > 210
    prompts = [tokens[start : start + length] for start, length in zip(_starts(len(tokens)), LENGTHS, strict=True)]
    related = [tokens[:SHARED] + tokens[start : start + 1 + start % 9] for start in range(80, 120, 2)]
    return Model(smollm2, module, prompts, related)


def _starts(total: int) -> list[int]:
    return [(37 * number) % (total - length + 1) for number, length in enumerate(LENGTHS)]


def engine(model: Model, **options: Any) -> LLM:
    """An engine over the module in memory: its weights are shared, so only the graph is made anew."""
    return LLM(model.module, verify=False, eos_token_id=[], **{"memory": "128MiB", "max_requests": 20, **options})


def answer(llm: LLM, prompts: Sequence[list[int]], length: int, seed: int = 0) -> list[RequestOutput]:
    """Submits in random order at random times, so that prompts meet others in every state; outputs in order of the prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    chance, outputs, moved = random.Random(seed), {}, threading.Condition()
    places = list(range(len(prompts)))
    chance.shuffle(places)

    def take(place: int):
        def sink(output: RequestOutput) -> None:
            with moved:
                if output.finished:
                    outputs[place] = output
                moved.notify_all()

        return sink

    with moved:
        for place in places:
            llm.submit(prompts[place], params, sink=take(place))
            for _ in range(chance.choice((0, 0, 1, 3))):  # outputs of others that pass before the next arrives
                moved.wait(0.5)
        assert moved.wait_for(lambda: len(outputs) == len(prompts), 1200)
    return [outputs[place] for place in range(len(prompts))]


def settled(llm: LLM) -> LLM:
    """Nothing is left that belongs to nobody."""
    cache = llm._engine.cache
    cache.audit()
    assert all(group.num_owned == 0 for group in cache.groups)
    return llm


def test_prompts_that_arrive_while_others_run_give_the_tokens_of_full_recompute(model):
    with LLM(model.path, dtype="float32", memory="64MiB", max_requests=6, max_batch_tokens=64, page_size=16, eos_token_id=[]) as llm:
        prompts = [prompt for prompt in model.prompts if len(prompt) in (1, 8, 16, 33, 65, 100)]
        ties = check_greedy(model.module, llm, answer(llm, prompts, 12), 12)
        assert ties <= 1
        # Steps were shared: one at a time, six answers of twelve tokens take at least 72.
        assert llm.stats.steps < 60
        settled(llm)


def test_few_pages_and_a_common_beginning_give_the_tokens_of_full_recompute(model):
    # 9 pages of 16 tokens (and the null page); each of six sequences comes to need 6, of which 4 are common
    with engine(model, memory=10 * 16 * token_bytes(model), max_batch_tokens=48, max_requests=6, max_model_len=128) as llm:
        ties = check_greedy(model.module, llm, answer(llm, model.related[:6], 24), 24)
        assert ties <= 1
        assert llm.stats.preemptions > 0
        assert llm.stats.reused_tokens >= 4 * 16
        settled(llm)


def token_bytes(model: Model) -> int:
    """Bytes that one token takes in the pools: keys and values of all layers in float32."""
    config: Any = model.module.config
    return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads


VARIANTS = {
    "one step at a time in chunks of 1": {"max_batch_tokens": 1},
    "chunks of 7": {"max_batch_tokens": 7},
    "chunks of 64, pages of 1": {"max_batch_tokens": 64, "page_size": 1},
    "chunks of 64, pages of 16": {"max_batch_tokens": 64, "page_size": 16},
    "without prefix reuse": {"prefix_cache": False},
    "chunks of 7, pages of 1, without prefix reuse": {"max_batch_tokens": 7, "page_size": 1, "prefix_cache": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_twenty_prompts_with_random_arrival(model, options):
    with engine(model, **options) as llm:
        ties = check_greedy(model.module, llm, answer(llm, model.prompts, 64), 64)
        print(f"ties: {ties} of {64 * len(model.prompts)}")
        assert ties <= 13, "more than one token in a hundred was chosen at a tie"
        settled(llm)


@pytest.mark.slow
def test_one_prompt_at_a_time(model):
    with engine(model) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
        outputs = [llm.generate(prompt, params)[0] for prompt in model.prompts]
        assert check_greedy(model.module, llm, outputs, 64) <= 13


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_cache_so_small_that_sequences_are_preempted(model, page_size):
    tokens = 640  # one sequence of 200 and 64, and what is left for others
    with engine(model, memory=(tokens + page_size) * token_bytes(model), page_size=page_size, max_model_len=320) as llm:
        outputs = answer(llm, model.prompts, 64)
        assert check_greedy(model.module, llm, outputs, 64) <= 13
        assert llm.stats.preemptions > 0
        assert sum(output.metrics.preemptions for output in outputs) == llm.stats.preemptions
        settled(llm)


@pytest.mark.slow
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_prompts_with_a_common_beginning(model, prefix_cache):
    with engine(model, prefix_cache=prefix_cache) as llm:
        first = answer(llm, model.related, 32)
        again = answer(llm, model.related, 32, seed=1)
        assert check_greedy(model.module, llm, first + again, 32) <= 13
        reused = {output.reused.length for output in again}
        assert (reused == {0}) is not prefix_cache
        if prefix_cache:
            assert min(reused) >= 64, "whole pages of the beginning are common to all"
            assert llm.stats.reused_tokens >= 64 * len(again)
        else:
            assert llm.stats.reused_tokens == 0
        settled(llm)


@pytest.mark.slow
def test_the_weights_are_those_that_transformers_reads(model):
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        model.path.parent, gguf_file=model.path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ours = model.module.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items())
