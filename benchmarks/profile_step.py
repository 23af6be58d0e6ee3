"""Where a decode step of ours spends its time: microseconds by kind of op, and what Python takes around them.

    python benchmarks/profile_step.py MODEL [--threads 2] [--requests 1] [--steps 32] [--context 128] [--functions]

A step is measured as a difference: `generate` with 1 + STEPS new tokens less `generate` with 1, so that prefill and the costs of a
request cancel. Only the public face is used, so the figures are a user's.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

REPEATS = 3
ENGINE_THREAD = "ad-"
"""How the name of the thread that steps our engine begins."""


@dataclass(frozen=True)
class Spent:
    """Microseconds and calls of one kind of op, less the ops it calls."""

    us: float
    calls: float


def main() -> None:
    arguments = _parse()
    # Thread pools read this when torch is imported.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments.threads)
    functions = cProfile.Profile()
    if arguments.functions:
        threading.setprofile(_join_in(functions))
    import ad_core

    llm = ad_core.LLM(
        arguments.model,
        device="cpu",
        dtype=arguments.dtype,
        threads=arguments.threads,
        max_batch_tokens=512,
        max_requests=arguments.requests,
        prefix_cache=False,
    )
    threading.setprofile(None)
    source = random.Random(0)
    prompts = [[source.randrange(100, 1000) for _ in range(arguments.context)] for _ in range(arguments.requests)]

    def run(new: int) -> None:
        llm.generate(prompts, ad_core.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True))

    with llm:
        run(2)  # first calls allocate and choose kernels
        if arguments.functions:
            _report_functions(run, functions, arguments.steps, arguments.rows)
        else:
            _report(run, arguments.steps, arguments.rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Where a decode step of ours spends its time.")
    parser.add_argument("model", help="a directory or a GGUF file")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--requests", type=int, default=1, help="requests that decode together")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=25, help="kinds of op (and functions) to print")
    parser.add_argument("--functions", action="store_true", help="the Python functions instead, by their own time")
    return parser.parse_args()


def _report(run: Callable[[int], None], steps: int, rows: int) -> None:
    plain = median(_seconds(run, 1 + steps) - _seconds(run, 1) for _ in range(REPEATS)) / steps * 1e6
    busy = median(_seconds(run, 1 + steps, time.process_time) - _seconds(run, 1, time.process_time) for _ in range(REPEATS)) / steps * 1e6
    before_seconds, before = _profiled(run, 1)
    after_seconds, after = _profiled(run, 1 + steps)
    profiled = (after_seconds - before_seconds) / steps * 1e6
    nothing = Spent(0.0, 0.0)
    spent = {
        name: Spent((total.us - before.get(name, nothing).us) / steps, (total.calls - before.get(name, nothing).calls) / steps)
        for name, total in after.items()
    }
    in_ops = sum(one.us for one in spent.values())
    calls = sum(one.calls for one in spent.values())
    print(f"{'op':<52}{'calls':>8}{'us a step':>12}{'share':>8}")
    for name, one in sorted(spent.items(), key=lambda item: -item[1].us)[:rows]:
        print(f"{name:<52}{one.calls:>8.1f}{one.us:>12.1f}{one.us / in_ops:>8.1%}")
    print(f"\na step without the profiler    {plain:>10.0f} us  ({1e6 / plain:.1f} steps a second)")
    print(f"  CPU time of all threads      {busy:>10.0f} us  (with one thread: what a step takes on a machine that nobody shares)")
    print(f"a step with the profiler       {profiled:>10.0f} us  ({calls:.0f} op records)")
    print(f"  inside ops                   {in_ops:>10.0f} us")
    print(f"  outside: Python, the runtime {profiled - in_ops:>10.0f} us  {(profiled - in_ops) / profiled:.1%} of it")
    print("(the profiler adds about a microsecond to each record: small ops and Python look larger than they are)")


def _seconds(run: Callable[[int], None], new: int, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run(new)
    return clock() - start


def _profiled(run: Callable[[int], None], new: int) -> tuple[float, Mapping[str, Spent]]:
    """Seconds of one run under the profiler, and each kind of op in it, whichever thread called it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    everywhere: Any = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as record:
        seconds = _seconds(run, new)
    return seconds, {entry.key: Spent(entry.self_cpu_time_total, entry.count) for entry in record.key_averages()}


def _join_in(profiler: cProfile.Profile) -> Callable[..., None]:
    """A thread hook that lets `profiler` follow the engine's thread, the only place where steps run."""

    def begin(*_: Any) -> None:
        sys.setprofile(None)
        if threading.current_thread().name.startswith(ENGINE_THREAD):
            profiler.enable()

    return begin


def _report_functions(run: Callable[[int], None], profiler: cProfile.Profile, steps: int, rows: int) -> None:
    """Own time of the functions of the engine's thread, ops among them. The profiler makes every call look dearer than it is.

    Summed here because `pstats` keeps one of several built-ins of one name, and all ops of a namespace share theirs.
    """
    profiler.clear()
    run(1 + steps)
    spent: dict[str, Spent] = {}
    for entry in profiler.getstats():
        name, so_far = _label(entry.code), spent.get(_label(entry.code), Spent(0.0, 0.0))
        spent[name] = Spent(so_far.us + entry.inlinetime * 1e6, so_far.calls + entry.callcount)
    total = sum(one.us for one in spent.values())
    print(f"{'function, of ' + str(steps) + ' decode steps and a prefill':<76}{'calls':>8}{'own us':>12}{'share':>8}")
    for name, one in sorted(spent.items(), key=lambda item: -item[1].us)[:rows]:
        print(f"{name[-75:]:<76}{one.calls:>8.0f}{one.us:>12.0f}{one.us / total:>8.1%}")


def _label(code: Any) -> str:
    return code if isinstance(code, str) else f"{code.co_filename}:{code.co_firstlineno}({code.co_name})"


if __name__ == "__main__":
    main()
