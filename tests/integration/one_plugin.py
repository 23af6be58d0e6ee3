"""Serves and refuses models in an environment that has the plugins it has, and prints as JSON what happened. The models' names are given:
types of the zoo, a type with "+deltas" whose layers all are delta rules, and "convolutions"."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from ad_core import LLM, SamplingParams
from ad_core.api.errors import AdError
from ad_core.registry import Registry
from tests.zoo.models import build, entries, prompt

LENGTH = 8
ENGINE = {"max_batch_tokens": 8, "page_size": 4, "max_requests": 2, "max_model_len": 64, "memory": "8MiB"}


class Convolutions(nn.Module):
    """A model of convolutions alone, each over its own channel: nothing else mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.filters = nn.ModuleList(nn.Conv1d(32, 32, 4, padding=3, groups=32) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, 128)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for mix, linear in zip(self.filters, self.linears, strict=True):
            x = x + linear(mix(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        return self.head(x)


def model(name: str) -> nn.Module:
    if name == "convolutions":
        torch.manual_seed(0)
        return Convolutions().eval().requires_grad_(False)
    kind, _, deltas = name.partition("+")
    entry = entries()[kind]
    if deltas:
        text = entry.config["text_config"]
        text = {**text, "layer_types": ["linear_attention"] * text["num_hidden_layers"]}
        entry = replace(entry, config={**entry.config, "text_config": text})
    return build(entry)


@torch.no_grad()
def recomputed(module: nn.Module, ids: list[int]) -> list[int]:
    given = {"use_cache": False} if hasattr(module, "config") else {}
    tokens = list(ids)
    for _ in range(LENGTH):
        result = module(torch.tensor([tokens]), **given)
        tokens.append(int(getattr(result, "logits", result)[0, -1].argmax()))
    return tokens[len(ids) :]


def served(name: str) -> dict[str, Any]:
    module = model(name)
    prompts = [prompt(length) for length in (1, 13)]
    with LLM(module, **ENGINE) as llm:
        answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True))
        ops = sorted({decision.subject for decision in llm.plan.decisions})
    oracle = model(name)
    return {
        "ops": ops,
        "equal": [answer.outputs[0].token_ids == recomputed(oracle, ids) for answer, ids in zip(answers, prompts, strict=True)],
    }


def refused(name: str) -> dict[str, Any]:
    try:
        LLM(model(name), **ENGINE).close()
    except AdError as error:
        return error.to_dict()
    return {"error": "", "hint": "it was served"}


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    asked = json.loads(sys.argv[1])
    plugins = sorted(info.name for info in Registry.load().infos)
    result = {"plugins": plugins, "served": [served(name) for name in asked["serves"]], "refused": refused(asked["refuses"])}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
