"""Writes the model, with random weights, as a directory in Hugging Face's form: configuration, code, weights and a tokenizer.

    python examples/nemotron_flash_like/write_model.py DIRECTORY

The tokenizer has a token a byte. As with a begin-of-sequence token, it is the tokenizer that keeps the first places of every text for
the meta tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from flash import PATTERN, Flash
from safetensors.torch import save_file

HERE = Path(__file__).parent
PLACE = "<meta>"


def main(folder: Path, pairs: int = len(PATTERN)) -> None:
    torch.manual_seed(0)
    tokenizer, vocabulary = byte_tokenizer(num_meta=8)
    model = Flash(vocabulary, width=64, heads=4, num_meta=8, pattern=PATTERN[:pairs])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    for name in ("flash.py", "modeling_flash.py"):
        shutil.copy(HERE / name, folder)
    config = {
        "model_type": "flash_like",
        "architectures": ["FlashForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_flash.FlashConfig", "AutoModelForCausalLM": "modeling_flash.FlashForCausalLM"},
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_meta_tokens": 8,
        "mixers": PATTERN[:pairs],
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def byte_tokenizer(num_meta: int):
    """A token a byte, and the one that stands `num_meta` times in front; with the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {PLACE: 0} | {letter: 1 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.add_special_tokens([PLACE])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{PLACE} " * num_meta + "$A", special_tokens=[(PLACE, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), len(letters)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
