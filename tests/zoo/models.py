"""Every causal language model type of transformers (`zoo.json` and `more.json`), tiny and with random weights that make a mistake show.

Logits spread by about 1, nothing that starts constant stays so (unit norms and zero biases hide bugs), windows and chunks are shorter
than the prompts, and every kind of layer of a hybrid is there.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

PATHS = tuple(Path(__file__).with_name(name) for name in ("zoo.json", "more.json"))
TRANSFORMERS = "5.23"
"""The version that the entries were written for. An older one has some of their types not, or with faults of its own."""


@dataclass(frozen=True)
class Entry:
    """One model type: `config` holds what differs from its defaults. `status` is "ok" if transformers' own checks of it pass, else
    `note` says what is wrong with it."""

    model_type: str
    config: dict[str, Any]
    seed: int
    perturb: float
    status: str
    note: str


@cache
def entries() -> dict[str, Entry]:
    """All entries by model type, in alphabetical order."""
    read = [each for path in PATHS for each in json.loads(path.read_text())]
    known = [Entry(**{name: each[name] for name in Entry.__dataclass_fields__}) for each in read]
    return {entry.model_type: entry for entry in sorted(known, key=lambda entry: entry.model_type)}


def build(entry: Entry) -> nn.Module:
    """The entry's model in float32 on the CPU, in eval mode: the same weights at every call. Raises what its class raises."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[entry.model_type](**copy.deepcopy(entry.config))
    torch.manual_seed(entry.seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    noise = torch.Generator().manual_seed(entry.seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(entry.perturb * torch.randn(parameter.shape, generator=noise))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.add_(entry.perturb * torch.randn(buffer.shape, generator=noise).to(buffer.dtype))
    return model.requires_grad_(False)


def prompt(length: int) -> list[int]:
    """Token ids that no entry gives a special meaning."""
    return torch.randint(4, 96, (length,), generator=torch.Generator().manual_seed(100 + length)).tolist()
