"""The rounds: workers of all engines stay loaded side by side and take turns, so that the noise of the machine hits all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.client import Worker, WorkerLost
from peers.tally import Sample, agreement
from peers.worker import Load

ENGINES: Mapping[str, str] = {"ours": "ours", "hf": "hf_generate", "llama.cpp": "llama_cpp"}
"""Name in the results and module of the worker."""
REFERENCE = "hf"
AGREED_AT_LEAST = 4
"""Leading greedy tokens on which an engine must agree with the reference, at each prompt, before its numbers count."""
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens. The defaults are what the results mean; others are for trying the benchmark out."""

    prompt: int = 128
    new: int = 65  # 64 intervals from the first token to the last
    requests: int = 16
    requests_new: int = 128
    prefill: int = 512

    @property
    def longest(self) -> int:
        return max(self.prompt + self.new, self.prefill + 1, 256)

    @property
    def longest_in_batch(self) -> int:
        return self.prompt + self.requests_new


SHORT = Workload(new=17, requests_new=8)


@dataclass
class Findings:
    """Everything that the rounds bring to light. Filled in place."""

    samples: list[Sample] = field(default_factory=list)
    read_gb_s: dict[int, list[float]] = field(default_factory=dict)
    linears_tokens_s: dict[int, list[float]] = field(default_factory=dict)
    """Of models whose manifest has the shapes of their linear layers."""
    absent: dict[str, str] = field(default_factory=dict)
    """Engine and why it has no numbers (any more)."""
    agreed: dict[str, list[int]] = field(default_factory=dict)
    """Engine and, for each probe, leading tokens equal to the reference's; the least over the thread counts."""
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    phases: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seconds of each phase of our cold start, by threads."""


class Contest:
    """Runs the cases at one thread count. Engines that fail are dropped with their reason; the others go on."""

    def __init__(
        self,
        model: Path,
        manifest: Mapping[str, Any],
        threads: int,
        workload: Workload,
        findings: Findings,
        say: Callable[[str], None],
        engines: Mapping[str, str] = ENGINES,
        agreed_at_least: int = AGREED_AT_LEAST,
    ):
        self._engines, self._agreed_at_least = engines, agreed_at_least
        self._manifest, self._threads, self._workload = manifest, threads, workload
        self._found, self._say = findings, say
        self._logs = model
        self._load = Load(
            directory=model / "hf",
            gguf=model / "model-bf16.gguf",
            threads=threads,
            max_requests=workload.requests,
            longest=workload.longest,
            longest_in_batch=workload.longest_in_batch,
        )
        self._workers: dict[str, Worker] = {}

    def run(self, cases: Iterable[str], rounds: int, cold_rounds: int) -> None:
        """Warm cases with all workers loaded, then cold starts with none."""
        warm = [case for case in cases if case in ("decode", "prefill", "concurrent")]
        try:
            if warm:
                self._rounds(warm, rounds)
        finally:
            for worker in self._workers.values():
                worker.close()
            self._workers.clear()
        if "cold" in cases:
            self._cold_starts(cold_rounds)

    def _rounds(self, cases: Sequence[str], rounds: int) -> None:
        for engine in self._engines:
            self._attempt(engine, self._start)
        self._compare_tokens()
        for engine in list(self._workers):
            self._attempt(engine, self._warm_up)
        ceiling = self._launch("ceiling")
        try:
            ceiling.ready()
            for number in range(rounds):
                self._found.read_gb_s.setdefault(self._threads, []).append(ceiling.ask(task="read")["gb_s"])
                if shapes := self._manifest.get("linears"):
                    alone = ceiling.ask(task="linears", shapes=shapes)["tokens_s"]
                    self._found.linears_tokens_s.setdefault(self._threads, []).append(alone)
                for case in cases:
                    for engine in self._turn(number):
                        self._attempt(engine, self._measure, case, number)
        finally:
            ceiling.close()
        for engine in list(self._workers):
            self._attempt(engine, self._peak)

    def _turn(self, number: int) -> list[str]:
        """A B C, C B A, A B C ..: whoever warms or heats the machine does so for both neighbours."""
        present = list(self._workers)
        return present if number % 2 == 0 else present[::-1]

    def _attempt(self, engine: str, action: Callable[..., None], *arguments: Any) -> None:
        if engine in self._found.absent:
            return
        try:
            action(engine, *arguments)
        except WorkerLost as lost:
            self._drop(engine, str(lost))

    def _drop(self, engine: str, reason: str) -> None:
        self._say(f"{engine}: absent, {reason}")
        self._found.absent[engine] = reason
        if worker := self._workers.pop(engine, None):
            worker.close()

    def _launch(self, module: str) -> Worker:
        return Worker(module, self._load, self._logs / f"{module}.log")

    def _start(self, engine: str) -> None:
        worker = self._workers[engine] = self._launch(self._engines[engine])
        worker.ready()
        self._found.engines[engine] = {key: value for key, value in worker.info.items() if key != "phases"}

    def _compare_tokens(self) -> None:
        """Drops engines whose greedy tokens are not the reference's: their speed would be the speed of something else."""
        answers: dict[str, list[list[int]]] = {}
        for engine in sorted(self._workers, key=lambda name: name != REFERENCE):
            self._attempt(engine, self._probe, answers)
        if not answers:
            return
        for engine, counts in agreement(answers).items():
            before = self._found.agreed.get(engine, counts)
            self._found.agreed[engine] = [min(pair) for pair in zip(before, counts, strict=True)]
            if min(counts) < self._agreed_at_least:
                self._drop(engine, f"its greedy tokens leave the reference's after {counts} of {PROBE_TOKENS}")

    def _probe(self, engine: str, answers: dict[str, list[list[int]]]) -> None:
        worker = self._workers[engine]
        answers[engine] = [worker.ask(task="one", prompt=ids, new=PROBE_TOKENS)["tokens"] for ids in self._manifest["probes"]]

    def _warm_up(self, engine: str) -> None:
        worker, size = self._workers[engine], self._workload
        worker.ask(task="one", prompt=self._ids(size.prefill, "warm-up"), new=4)
        worker.ask(task="batch", prompts=self._prompts(), new=2)

    def _measure(self, engine: str, case: str, number: int) -> None:
        worker, size = self._workers[engine], self._workload
        match case:
            case "decode":
                events = worker.ask(task="one", prompt=self._ids(size.prompt, "decode"), new=size.new)["events"]
                (first_at, first), (last_at, last) = events[0], events[-1]
                self._expect(engine, last, size.new)
                value = (last - first) / (last_at - first_at)
            case "prefill":
                events = worker.ask(task="one", prompt=self._ids(size.prefill, f"prefill {number}"), new=1)["events"]
                value = size.prefill / events[0][0]
            case "concurrent":
                reply = worker.ask(task="batch", prompts=self._prompts(), new=size.requests_new)
                count = sum(map(len, reply["tokens"]))
                self._expect(engine, count, size.requests * size.requests_new)
                value = count / reply["seconds"]
            case other:
                raise AssertionError(f"{other} is no warm case")
        self._keep(case, engine, number, value)

    def _expect(self, engine: str, count: int, wanted: int) -> None:
        if count != wanted:
            raise WorkerLost(f"made {count} tokens where {wanted} were asked for")

    def _peak(self, engine: str) -> None:
        self._keep("memory", engine, 0, self._workers[engine].ask(task="peak")["peak_mb"])

    def _cold_starts(self, rounds: int) -> None:
        present = [engine for engine in self._engines if engine not in self._found.absent]
        for number in range(rounds):
            for engine in present if number % 2 == 0 else present[::-1]:
                self._attempt(engine, self._cold_start, number)

    def _cold_start(self, engine: str, number: int) -> None:
        """From the start of a new process to the arrival of its first token here, outside it."""
        worker = self._workers[engine] = self._launch(self._engines[engine])
        worker.send(task="one", prompt=self._manifest["probes"][0], new=1)
        worker.ready()
        worker.receive()
        self._keep("cold", engine, number, worker.elapsed())
        self._found.engines.setdefault(engine, {key: value for key, value in worker.info.items() if key != "phases"})
        if "phases" in worker.info:
            self._found.phases[self._threads] = worker.info["phases"]
        self._workers.pop(engine).close()

    def _keep(self, case: str, engine: str, number: int, value: float) -> None:
        self._say(f"{self._threads} threads, round {number + 1}: {case:<10} {engine:<10} {value:10.2f}")
        self._found.samples.append(Sample(case, self._threads, engine, number, value))

    def _prompts(self) -> list[list[int]]:
        return [self._ids(self._workload.prompt, f"request {number}") for number in range(self._workload.requests)]

    def _ids(self, count: int, seed: str) -> list[int]:
        """Random token ids, the same for the same seed, without special tokens."""
        ordinary = sorted(set(range(self._manifest["vocab_size"])) - set(self._manifest["special_ids"]))
        return random.Random(seed).choices(ordinary, k=count)
