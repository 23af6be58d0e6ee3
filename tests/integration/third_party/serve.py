"""Runs the library's model in our engine and prints, as JSON, what happened and what the model itself says."""

from __future__ import annotations

import json
from typing import Any

import smooth_library
import torch

from ad_core import LLM, SamplingParams
from ad_core.api.errors import AdError

LENGTH = 24


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, smooth_library.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def recomputed(model: torch.nn.Module, ids: list[int]) -> list[int]:
    tokens = list(ids)
    for _ in range(LENGTH):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(ids) :]


def main() -> dict[str, Any]:
    model = smooth_library.model()
    common = prompt(40, 9)
    prompts = [prompt(length, length) for length in (1, 7, 8, 9, 33)] + [common + prompt(length, length) for length in (1, 2, 11)]
    options = {"page_size": 4, "max_batch_tokens": 8, "max_requests": 3, "checkpoint_interval": 8, "max_model_len": smooth_library.LONGEST}
    with LLM(model, memory=MEMORY, **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
        first, second = llm.generate(prompts, params), llm.generate(prompts, params)
        llm._engine.cache.audit()
        expected = [recomputed(model, ids) for ids in prompts]
        return {
            "equal": [
                [output.outputs[0].token_ids == ids for output, ids in zip(outputs, expected, strict=True)] for outputs in (first, second)
            ],
            "reused": [output.reused.length for output in second],
            "preemptions": llm.stats.preemptions,
            "claims": [[claim.module, claim.op, claim.by] for claim in llm.plan.claims],
            "kernels": {decision.subject: decision.winner for decision in llm.plan.decisions},
            "kinds": sorted({entry.kind for entry in llm.plan.resources}),
            "verified": llm.plan.attempts[-1].reason,
        }


MEMORY = 100 * (2 * 2 * 4 * smooth_library.WIDTH)
"""Keys and values of two layers in float32 for 100 tokens: one sequence always fits, three do not."""


def refusal(denied: str) -> dict[str, Any]:
    """The error without one of the two plugins."""
    try:
        LLM(smooth_library.model(), max_model_len=smooth_library.LONGEST, deny_plugins=[denied])
    except AdError as error:
        return error.to_dict()
    raise AssertionError(f"the model was captured without {denied}")


if __name__ == "__main__":
    print(json.dumps({"served": main(), **{f"without {name}": refusal(name) for name in ("smooth", "attention")}}))
