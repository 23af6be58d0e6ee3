"""One entry of the zoo through everything: capture, an engine, ragged greedy answers, a round over the disk."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ad_core import LLM, SamplingParams
from ad_core.api.errors import AdError
from ad_core.plan import Plan

from .models import Entry, build, prompt

LENGTHS = (1, 9, 33)
STEPS = 24
TIE = 1e-3
"""Where the oracle's two best logits are closer than this, either token is right; logits may differ by no more."""
ENGINE = {"max_batch_tokens": 8, "page_size": 4, "checkpoint_interval": 16, "max_requests": 4, "max_model_len": 64, "memory": "8MiB"}


@dataclass
class Result:
    """What became of an entry. `stage` and `reason` say where and why the first check failed, if one did."""

    model_type: str
    status: str = "fail"
    """"pass", "fail", or "upstream": there is no such type in this transformers, or its own module contradicts itself."""
    stage: str = ""
    reason: str = ""
    mixers: dict[str, int] = field(default_factory=dict)
    """Canonical ops by name, with how many of them the plan has a kernel for."""
    captured_by: list[str] = field(default_factory=list)
    """"annotated", "seam", "pattern"."""
    ties: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Failure(Exception):
    """A check that did not hold."""


def check(entry: Entry) -> Result:
    """Runs the entry through all stages: build, capture, greedy, disk. Whatever is raised on the way ends up in the result."""
    result = Result(entry.model_type)
    start = time.perf_counter()
    oracle = None
    try:
        with _stage(result, "build"):
            module, oracle = build(entry), build(entry)
            prompts = [prompt(length) for length in LENGTHS]
        with _stage(result, "capture"), LLM(module, **ENGINE) as llm:
            _describe(result, llm.plan)
            with _stage(result, "greedy"):
                result.ties = _check_greedy(oracle, llm, prompts)
        with _stage(result, "disk"), tempfile.TemporaryDirectory() as folder:
            build(entry).save_pretrained(folder)
            with LLM(folder, **ENGINE) as llm:
                _check_logits(oracle, llm, prompts)
        result.status = "pass"
    except _Stopped:
        blamed = _absent(entry) if oracle is None else contradiction(oracle)
        if blamed:
            result.status, result.reason = "upstream", blamed
    result.seconds = round(time.perf_counter() - start, 1)
    return result


class _Stopped(Exception):
    pass


@contextmanager
def _stage(result: Result, name: str) -> Iterator[None]:
    try:
        yield
    except _Stopped:
        raise
    except Exception as error:  # anything may go wrong in somebody else's model: it is what the table is for
        result.stage, result.reason = name, _words(error)
        raise _Stopped from error


def _words(error: Exception) -> str:
    if isinstance(error, AdError):
        parts = [error.what, error.where and f"at {error.where}", error.why]
        text = "; ".join(str(part) for part in parts if part)
    else:
        text = f"{type(error).__name__}: {error}" if not isinstance(error, Failure) else str(error)
    return " ".join(text.split())


def _describe(result: Result, plan: Plan) -> None:
    kinds = {"seam": "seam", "matcher": "pattern", "annotated": "annotated"}
    served = [(each.subject, len(each.members) or 1) for each in plan.decisions if each.rule != "match"]
    result.mixers = {op: sum(count for name, count in served if name == op) for op, _ in served}
    result.captured_by = sorted({kinds[claim.by.split()[0]] for claim in plan.claims})


@torch.no_grad()
def logits_of(module: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """[S, V] of one whole sequence by the original module, without a cache and without anything of ours."""
    with _FirstOfEqual():
        logits: torch.Tensor = module(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0].float()


class _FirstOfEqual(TorchFunctionMode):
    """`topk` leaves open which of equal values it takes, and takes others at other lengths: an indexer with few heads has many scores of
    exactly zero, and its model then contradicts its own prefix. Here the first is taken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "k", "dim", "largest"), args, strict=False)) | (kwargs or {})
        dim, count = given.get("dim", -1), given["k"]
        best = torch.sort(given["input"], dim=dim, descending=given.get("largest", True), stable=True)
        return torch.return_types.topk([values.narrow(dim, 0, count).contiguous() for values in best])


def contradiction(oracle: nn.Module) -> str | None:
    """Why nobody can answer token by token as this module does: what it says at a token changes when others follow, or it does not run."""
    ids = prompt(max(LENGTHS) + STEPS)
    try:
        whole = logits_of(oracle, ids)
        for seen in (*LENGTHS, len(ids) - 1):
            apart = float((logits_of(oracle, ids[:seen]) - whole[:seen]).abs().max())
            if apart > 100 * TIE:
                return f"the author's module looks ahead: its logits of {seen} tokens change by {apart:.2g} when others follow"
    except Exception as error:  # anything may go wrong in somebody else's model
        return f"the author's module does not run: {_words(error)}"
    return None


def _absent(entry: Entry) -> str | None:
    from transformers import CONFIG_MAPPING, __version__

    return None if entry.model_type in CONFIG_MAPPING else f"transformers {__version__} has no such model type"


def _check_greedy(oracle: nn.Module, llm: LLM, prompts: Sequence[Sequence[int]]) -> int:
    """All prompts at once; returns the number of tokens that were chosen at a tie.

    The oracle reads prompt and answer in one forward: if each of its choices is the answer's token, then stepping it by full
    recompute gives this answer, for it would have read the same tokens at every step.
    """
    ties = 0
    for ids, output in zip(prompts, llm.generate([list(ids) for ids in prompts], _greedy(STEPS)), strict=True):
        if output.error is not None:
            raise Failure(f"prompt of {len(ids)}: {output.error}")
        answer = output.outputs[0].token_ids
        if len(answer) != STEPS:
            raise Failure(f"prompt of {len(ids)}: {len(answer)} tokens and not {STEPS}")
        logits = logits_of(oracle, [*ids, *answer[:-1]])[len(ids) - 1 :]
        behind = logits.amax(1) - logits[torch.arange(STEPS), torch.tensor(answer)]
        wrong = (behind > TIE).nonzero().flatten().tolist()
        if wrong or bool(behind.isnan().any()):
            at = wrong[0] if wrong else 0
            raise Failure(f"prompt of {len(ids)}: token {at} of the answer is {float(behind[at]):.3g} behind the oracle's choice")
        if bool((behind > 0).any()):
            ties += int((behind > 0).sum())
            _check_steps(llm, ids, answer, logits)
    if llm.stats.preemptions:
        raise Failure(f"{llm.stats.preemptions} preemptions, and there was room for all")
    llm._engine.cache.audit()
    return ties


def _check_steps(llm: LLM, ids: Sequence[int], answer: Sequence[int], logits: torch.Tensor) -> None:
    """Teacher-forced: the engine's log-probabilities behind every part of the answer are the oracle's."""
    starts = [[*ids, *answer[:count]] for count in range(len(answer))]
    for row, output in enumerate(llm.generate(starts, _greedy(1, logprobs=100))):  # type: ignore[arg-type]
        _compare(output, logits[row], f"prompt of {len(ids)}, {row} tokens on")


def _check_logits(oracle: nn.Module, llm: LLM, prompts: Sequence[Sequence[int]]) -> None:
    for ids, output in zip(prompts, llm.generate([list(ids) for ids in prompts], _greedy(1, logprobs=100)), strict=True):
        _compare(output, logits_of(oracle, ids)[-1], f"prompt of {len(ids)}")


def _compare(output: Any, logits: torch.Tensor, where: str) -> None:
    if output.error is not None:
        raise Failure(f"{where}: {output.error}")
    (step,) = output.outputs[0].logprobs or ()
    wanted = logits.log_softmax(0)
    worst = max(abs(value - float(wanted[index])) for index, value in step.items())
    if not worst <= TIE:
        raise Failure(f"{where}: a log-probability is {worst:.3g} away from the oracle's")


def _greedy(count: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=logprobs)
