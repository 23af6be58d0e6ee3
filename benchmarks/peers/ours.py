"""Ours: `ad_core.LLM` with the eager graph, prefix cache off so that no run profits from an earlier one."""

from __future__ import annotations

import time
from typing import Any

from peers.worker import Load, Timed, TimedBatch, serve

MAX_BATCH_TOKENS = 512  # the whole prefill of the benchmark in one step, as the peers do


class Ours:
    """The public face only: what a user writes is what is measured."""

    def __init__(self, load: Load):
        import ad_core

        self._version = ad_core.__version__
        self._params = ad_core.SamplingParams
        self._llm = ad_core.LLM(
            str(load.directory),
            device="cpu",
            dtype="bfloat16",
            threads=load.threads,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_requests=load.max_requests,
            prefix_cache=False,
        )

    def one(self, prompt: list[int], new: int) -> Timed:
        timed = Timed()
        start = time.perf_counter()
        for output in self._llm.stream(prompt, self._greedy(new)):
            timed.tokens = list(output.outputs[0].token_ids)
            timed.events.append((time.perf_counter() - start, len(timed.tokens)))
        return timed

    def batch(self, prompts: list[list[int]], new: int) -> TimedBatch:
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, self._greedy(new))
        seconds = time.perf_counter() - start
        return TimedBatch(tokens=[list(output.outputs[0].token_ids) for output in outputs], seconds=seconds)

    def info(self) -> dict[str, Any]:
        settings = f"bf16, eager graph, {MAX_BATCH_TOKENS} tokens a step, prefix cache off"
        return {"version": self._version, "settings": settings, "phases": dict(self._llm.plan.phases)}

    def _greedy(self, new: int) -> Any:
        return self._params(temperature=0, max_tokens=new, ignore_eos=True)


if __name__ == "__main__":
    serve(Ours)
