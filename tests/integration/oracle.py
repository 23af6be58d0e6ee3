"""Greedy answers held against the uncached model, one forward a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ad_core import LLM, SamplingParams
from ad_core.llm import RequestOutput

from ..zoo_models import logits_of

TIE = 1e-3
"""Where the oracle's two best logits are closer than this, either token is right."""


def check_greedy(module: nn.Module, llm: LLM, outputs: Sequence[RequestOutput], length: int) -> int:
    """Every token of every answer is the oracle's choice behind what stands before it; returns the number of ties.

    The oracle reads prompt and answer in one forward. If all its choices are the answer's tokens, then stepping it by full
    recompute gives just that answer: it would have read the same tokens at every step. An answer that departs from it at a tie
    is read again by the engine, token by token, and its log-probabilities are held against the oracle's.
    """
    ties = 0
    for output in outputs:
        assert output.error is None, output.error
        answer, prompt = output.outputs[0].token_ids, output.prompt_token_ids
        assert len(answer) == length, f"{len(answer)} tokens of {length} behind a prompt of {len(prompt)}"
        logits = logits_of(module, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
        best = logits.amax(1)
        behind = best - logits[torch.arange(length), torch.tensor(answer)]
        differs = behind > 0
        assert float(behind.max()) <= TIE, (
            f"prompt of {len(prompt)}: token {int(behind.argmax())} is {float(behind.max()):.3g} behind the oracle's"
        )
        if bool(differs.any()):
            ties += int(differs.sum())
            _compare_logprobs(llm, prompt, answer, logits)
    return ties


def _compare_logprobs(llm: LLM, prompt: Sequence[int], answer: Sequence[int], logits: torch.Tensor) -> None:
    starts: list[Any] = [[*prompt, *answer[:count]] for count in range(len(answer))]
    oracle = logits.log_softmax(1)
    for row, output in enumerate(llm.generate(starts, SamplingParams(temperature=0.0, max_tokens=1, logprobs=5))):
        (step,) = output.outputs[0].logprobs or ()
        assert all(abs(value - float(oracle[row, index])) <= TIE for index, value in step.items())
