"""Half precision on real weights: our bfloat16 logits are as close to float32 as transformers' own bfloat16 logits are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ad_core.cache.batch import Row
from ad_core.capture import open_model
from ad_core.config import make_config
from ad_core.pipeline import Built, build
from ad_core.registry import Registry

from ..zoo_models import logits_of
from .test_real_weights import TEXT

LENGTHS = [75 + 2 * number for number in range(16)]
PREFILLED = 70
PAGES = 7
"""Of 16 tokens, for each of the sequences."""


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokens = open_model(smollm2, loaders=Registry.load().loaders(), dtype="float32").tokenizer()(TEXT)["input_ids"]
    return [tokens[5 * number : 5 * number + length] for number, length in enumerate(LENGTHS)]


def theirs(path: Path, dtype: str, prompts: list[list[int]]) -> torch.Tensor:
    """Logits of every token of every prompt [sum of lengths, V], in float32."""
    module = open_model(path, loaders=Registry.load().loaders(), dtype=dtype).runnable("cpu")
    return torch.cat([logits_of(module, prompt) for prompt in prompts])


def ours(built: Built, prompts: list[list[int]]) -> torch.Tensor:
    """The same from the engine's steps: each prompt begun in one chunk, then all of them token by token, together."""
    tables = [tuple(range(1 + PAGES * number, 1 + PAGES * (number + 1))) for number in range(len(prompts))]
    logits: list[list[torch.Tensor]] = []
    for number, prompt in enumerate(prompts):
        row = Row(prompt[:PREFILLED], 0, number + 1, (tables[number],), num_outputs=PREFILLED)
        logits.append([built.model.step([row]).float()])
    for place in range(PREFILLED, max(map(len, prompts))):
        alive = [number for number, prompt in enumerate(prompts) if place < len(prompt)]
        rows = [Row([prompts[number][place]], place, number + 1, (tables[number],)) for number in alive]
        for number, each in zip(alive, built.model.step(rows).float(), strict=True):
            logits[number].append(each[None])
    return torch.cat([torch.cat(parts) for parts in logits])


def rmse(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return float((logits - truth).square().mean().sqrt())


@pytest.mark.slow
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(smollm2, prompts):
    options: dict[str, Any] = {"dtype": "bfloat16", "verify": False, "memory": "64MiB", "max_requests": 16, "max_batch_tokens": 128}
    built = build(str(smollm2), make_config(options))
    truth, half = theirs(smollm2, "float32", prompts), theirs(smollm2, "bfloat16", prompts)
    error, bound = rmse(ours(built, prompts), truth), rmse(half, truth)
    print(f"ours {error:.5f}, transformers {bound:.5f}")
    assert error <= 1.05 * bound
