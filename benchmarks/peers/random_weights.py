"""A model with random bf16 weights as an HF directory: `python -m peers.random_weights TARGET MODEL_TYPE CONFIG_AS_JSON`.

Writes TARGET/hf and TARGET/manifest.json. A process of its own, so that the driver never loads torch.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

PROBES, PROBE_LENGTH = 3, 24


def main() -> None:
    target, kind, config = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    made = CONFIG_MAPPING[kind](**config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # logits that spread, so that two engines can be told to agree
    model.save_pretrained(target / "hf")
    source = random.Random(0)
    manifest = {
        "model_type": kind,
        "vocab_size": made.vocab_size,
        "special_ids": [],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linears": _linears(model),
        "probes": [source.choices(range(made.vocab_size), k=PROBE_LENGTH) for _ in range(PROBES)],
    }
    (target / "manifest.json").write_text(json.dumps(manifest))


def _linears(model: Any) -> list[list[int]]:
    """(out, in) of each weight that a token is multiplied with: of experts, those of as many as it is sent to."""
    shapes = []
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith(("Linear", "Router")):
            shapes.append(list(module.weight.shape))
        elif kind.endswith("Experts"):
            shapes += [list(stack.shape[1:]) for stack in module.parameters(recurse=False)] * model.config.num_experts_per_tok
    return shapes


if __name__ == "__main__":
    main()
