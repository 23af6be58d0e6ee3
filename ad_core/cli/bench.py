"""`ad bench`: how fast a model answers here, and how near that is to what the memory can deliver."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ad_core.api.errors import ConfigError
from ad_core.cli import options

if TYPE_CHECKING:
    from ad_core.llm import LLM
    from ad_core.plan import Plan

READ_BYTES = 256 << 20
"""What the memory is measured with: several times a last-level cache."""


@dataclass(frozen=True)
class Measured:
    """The median of all repetitions, and their range."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Bandwidth:
    """Bytes that a decode has to read for one token, at the rate that it reached, and as a share of what the memory gives.

    `bytes_per_token` is weights and cache together, the cache at its mean length of the run.
    """

    bytes_per_token: int
    gb_s: float
    memory_gb_s: float
    share: float


@dataclass(frozen=True)
class Result:
    """Seconds and tokens a second. Latency is of one request alone, throughput of `requests` at once, their prompts included."""

    input_tokens: int
    output_tokens: int
    requests: int
    repetitions: int
    threads: int
    first_token_s: Measured
    decode_tokens_s: Measured
    bandwidth: Bandwidth
    total_tokens_s: Measured
    new_tokens_s: Measured


def bench(
    model: options.Model,
    input_tokens: Annotated[int, typer.Option("--in", min=1, help="Tokens of a prompt; they are random.")] = 128,
    output_tokens: Annotated[int, typer.Option("--out", min=2, help="Tokens of an answer; it does not end earlier.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Requests at once, for the throughput.")] = 16,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement; one more comes first and is thrown away.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: options.Config = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    memory: options.Memory = None,
    settings: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure latency and throughput, in tokens a second and in bytes a second beside what the memory can deliver.

    Greedy answers to random prompts, ends of sequence ignored, prefixes not reused (so `prefix_cache` is off).
    """
    from ad_core.llm import LLM

    chosen = options.llm_options(config, device, dtype, threads, memory, settings, trust_remote_code)
    with LLM(model, progress=sys.stderr.isatty(), **{**chosen, "prefix_cache": False}) as llm:
        result = measure(llm, input_tokens, output_tokens, requests, repetitions)
        plan = llm.plan
    if as_json:
        import json

        print(json.dumps({"model": plan.model, "plan": plan.digest, "start_s": sum(plan.phases.values()), **asdict(result)}, indent=2))
    else:
        print("\n".join(lines(plan, result)))


def measure(llm: LLM, input_tokens: int, output_tokens: int, requests: int, repetitions: int) -> Result:
    """Runs both measurements, latency and throughput in turn, so that a busy moment of the machine meets both.

    Raises `ConfigError` if the model or its cache is too short for a request.
    """
    import torch

    if input_tokens + output_tokens > llm.max_length:
        raise ConfigError(
            f"a request of {input_tokens} and {output_tokens} tokens is longer than the {llm.max_length} that fit",
            hint="lower --in and --out, or raise --memory",
        )
    draw = _prompts(llm, input_tokens)
    read_gb_s, one, many = [], [], []
    for turn in range(repetitions + 1):
        rate = memory_gb_s(llm.device)
        latency = _latency(llm, draw(1)[0], output_tokens)
        seconds = _throughput(llm, draw(requests), output_tokens)
        if turn:  # the first turn warms caches and allocators up
            read_gb_s.append(rate)
            one.append(latency)
            many.append(seconds)
    decode = Measured.of([(output_tokens - 1) / rest for _, rest in one])
    size = bytes_per_token(llm.plan, input_tokens + output_tokens // 2)
    gb_s, memory = size * decode.median / 1e9, median(read_gb_s)
    return Result(
        input_tokens,
        output_tokens,
        requests,
        repetitions,
        torch.get_num_threads(),
        Measured.of([first for first, _ in one]),
        decode,
        Bandwidth(size, gb_s, memory, gb_s / memory),
        Measured.of([requests * (input_tokens + output_tokens) / seconds for seconds in many]),
        Measured.of([requests * output_tokens / seconds for seconds in many]),
    )


def bytes_per_token(plan: Plan, length: int) -> int:
    """Bytes that one decode step at batch 1 reads: every weight once, and what mixers keep for `length` tokens.

    Counts all weights, and so the whole embedding: a model that ties it reads it for its logits; one that does not reads a row of it,
    and its share comes out a little too high; so does that of a mixture of experts, which reads only those that are chosen. Memory that
    several nodes share is read by each of them.
    """
    cache = 0
    for entry in plan.resources:
        tokens = 1 if entry.kind == "slots" else length if entry.window is None else min(length, entry.window)
        cache += tokens // entry.every * entry.unit_bytes * (1 + len(entry.shared_by))
    return plan.memory["weights"] + cache


def memory_gb_s(device: Any) -> float:
    """What the memory delivers to a plain read with the process's threads: the best of five sums of 256 MiB."""
    import torch

    block = torch.ones(READ_BYTES // 4, device=device)

    def read() -> float:
        start = time.perf_counter()
        block.sum().item()  # waits for the device
        return time.perf_counter() - start

    return READ_BYTES / min(read() for _ in range(5)) / 1e9


def lines(plan: Plan, result: Result) -> list[str]:
    """The result for a person."""
    from ad_core.cli.explain import headline
    from ad_core.progress import megabytes

    band = result.bandwidth
    return [
        headline(plan),
        f"{result.repetitions} repetitions, medians (and range); {_count(result.threads, 'CPU thread')}",
        "",
        f"one request of {result.input_tokens} tokens in, {result.output_tokens} out",
        f"  first token   {_range(result.first_token_s, 3)} s",
        f"  decode        {_range(result.decode_tokens_s)} tokens/s",
        f"                {band.gb_s:.1f} GB/s: {megabytes(band.bytes_per_token)} of weights and cache a token",
        f"                {band.share:.0%} of the {band.memory_gb_s:.1f} GB/s that the memory gives to a plain read",
        "",
        f"{_count(result.requests, 'request')} at once, each {result.input_tokens} in, {result.output_tokens} out",
        f"  new tokens    {_range(result.new_tokens_s)} tokens/s",
        f"  all tokens    {_range(result.total_tokens_s)} tokens/s",
    ]


def _prompts(llm: LLM, length: int) -> Callable[[int], list[list[int]]]:
    """Draws prompts of random ids, other ones each time: no two begin alike."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocab_size = llm.vocab_size

    def draw(count: int) -> list[list[int]]:
        ids: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
        return ids

    return draw


def _latency(llm: LLM, prompt: list[int], output_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    start, first = time.perf_counter(), 0.0
    for output in llm.stream(prompt, _greedy(output_tokens)):
        if output.error is not None:
            raise output.error
        first = first or time.perf_counter()
    return first - start, time.perf_counter() - first


def _throughput(llm: LLM, prompts: list[list[int]], output_tokens: int) -> float:
    """Seconds for all of them together."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, _greedy(output_tokens))
    seconds = time.perf_counter() - start
    for output in outputs:
        if output.error is not None:
            raise output.error
    return seconds


def _greedy(count: int) -> Any:
    from ad_core.runtime.params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _range(value: Measured, digits: int = 1) -> str:
    return f"{value.median:,.{digits}f} ({value.least:,.{digits}f} to {value.most:,.{digits}f})"
