"""The main job, end to end: an unmodified model answers through its own captured, cached and compiled graph.

    python examples/demo.py MODEL [--prompt "..."]

MODEL is a directory, or a GGUF file. Prints the answer token by token, then what was captured and which kernels ran.
"""

from __future__ import annotations

import argparse
import sys
import time

from ad_core import LLM, SamplingParams
from ad_core.cli.explain import print_plan

QUESTION = "What is the capital of France, and what is it known for?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=96)
    options = parser.parse_args()
    with LLM(options.model, progress=True) as llm:
        print(f"\n> {options.prompt}\n")
        start, first, count = time.perf_counter(), 0.0, 0
        for output in llm.stream(
            [{"role": "user", "content": options.prompt}], SamplingParams(temperature=0, max_tokens=options.max_tokens)
        ):
            first = first or time.perf_counter() - start
            count = len(output.outputs[0].token_ids)
            sys.stdout.write(output.outputs[0].delta)
            sys.stdout.flush()
        seconds = time.perf_counter() - start
        print(f"\n\n{count} tokens, first after {first:.2f} s, then {(count - 1) / max(seconds - first, 1e-9):.1f} tokens/s\n")
        print_plan(llm.plan)


if __name__ == "__main__":
    main()
