"""The model both ways, each held against itself as a function of whole sequences.

    python examples/nemotron_flash_like/generate.py [--pairs 4]

Needs ad-attention, ad-mamba and ad-deltanet (which bring ad-conv).
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import torch
import write_model
from flash import PATTERN, Flash

from ad_core import LLM, SamplingParams

PROMPT, LENGTH = "My model is not in transformers.", 12
SIZES = {"max_model_len": 128, "memory": "16MiB", "max_batch_tokens": 32, "page_size": 16, "checkpoint_interval": 16}


@torch.no_grad()
def recomputed(model: Flash, ids: list[int]) -> list[int]:
    """The whole sequence again for every token: slow, and right."""
    ids, start = list(ids), len(ids)
    for _ in range(LENGTH):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def answered(llm: LLM, prompt: str | list[int]) -> tuple[list[int], list[int]]:
    """The ids of the prompt and of the answer, asked for twice: the second time most of the prompt is in the cache."""
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    first, again = llm.generate(prompt, params)[0], llm.generate(prompt, params)[0]
    print(f"  {first.outputs[0].token_ids}; asked again, {again.reused.length} of {len(again.prompt_token_ids)} tokens were in the cache")
    if first.outputs[0].token_ids != again.outputs[0].token_ids:
        raise SystemExit("the second answer is another one")
    return first.prompt_token_ids, first.outputs[0].token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=len(PATTERN), help="of a mixer and a feed-forward")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "flash"
        write_model.main(folder, pairs)
        print("a directory:")
        with LLM(folder, trust_remote_code=True, **SIZES) as llm:
            ids, answer = answered(llm, PROMPT)
            found = Counter((claim.op, claim.by) for claim in llm.plan.claims)
        torch.manual_seed(0)
        model = Flash(llm.vocab_size, pattern=PATTERN[:pairs]).eval()
    print("a module:")
    with LLM(model, **SIZES) as llm:
        _, other = answered(llm, ids)
    print(f"whole sequences:\n  {(expected := recomputed(model, ids))}")
    for (op, by), count in found.items():
        print(f"{count:3} x {op}, {by}")
    if not answer == other == expected:
        raise SystemExit("the ways part")


if __name__ == "__main__":
    main()
