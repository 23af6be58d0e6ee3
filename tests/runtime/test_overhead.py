"""What a step costs beside the model: the fastest of many, since other programs run here too."""

from __future__ import annotations

import time

import pytest
import torch

from ad_core.api.types import Limits
from ad_core.cache.spec import CacheSpec, PageGroupSpec
from ad_core.runtime.engine import Engine
from ad_core.runtime.params import SamplingParams

VOCAB = 49152


class Instant:
    """An executor that costs nothing and notes when it ran."""

    def __init__(self, max_sequences: int):
        self.spec = CacheSpec(16, (PageGroupSpec(None, 1),))
        self.limits, self.vocab_size = Limits(512, max_sequences, 4096, 16), VOCAB
        self.last_ids = torch.zeros(max_sequences + 1, dtype=torch.int64)
        self.logits = torch.randn(max_sequences, VOCAB, generator=torch.Generator().manual_seed(0))

    def step(self, rows):
        return self.logits[: sum(row.num_outputs for row in rows)]

    def copy_slot(self, source, target):
        raise AssertionError


@pytest.mark.parametrize(("batch", "limit"), [(1, 0.0005), (16, 0.003)])
def test_a_greedy_step_costs_the_host_little(batch, limit):
    engine = Engine(Instant(batch), [2000])
    for index in range(batch):
        engine.submit([index] * 100, SamplingParams(temperature=0.0, max_tokens=None))
    while engine.num_running < batch or engine.stats.sampled_tokens < 2 * batch:
        engine.step()
    fastest = float("inf")
    for _ in range(100):
        start = time.perf_counter()
        engine.step()
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < limit
