"""The transformers configuration that a GGUF file's metadata describes, by transformers' own tables."""

from __future__ import annotations

from typing import Any

import torch

from ad_core.api.errors import UnknownModelError
from ad_quant.gguf_file import ArrayOfStrings, GgufFile

_PLAIN = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "starcoder2": "starcoder2",
    "nemotron": "nemotron",
    "gpt2": "gpt2",
}
"""Architectures whose configuration is a renaming of keys: (GGUF's name, transformers'). transformers reads the others itself, slowly."""


def config_of(file: GgufFile) -> Any:
    """The configuration. Its dtype is that of the file's numbers, and bfloat16 if they are quantised: what that loses is far less than
    what quantising lost. Raises `UnknownModelError`."""
    from transformers import AutoConfig

    architecture = file.metadata.get("general.architecture")
    try:
        if architecture in _PLAIN:
            fields = _fields(file, str(architecture))
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        else:
            config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except Exception as error:  # transformers raises ValueError, KeyError, NotImplementedError for what it does not know
        raise UnknownModelError(
            f"transformers cannot open GGUF files of the architecture {architecture!r}",
            where=str(file.path),
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            hint="a newer transformers may know it; or give the model's original checkpoint, a directory with safetensors",
        ) from error
    config.dtype = _dtype(file)
    return config


def _fields(file: GgufFile, architecture: str) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_TO_TRANSFORMERS_MAPPING

    tables, known = GGUF_TO_TRANSFORMERS_MAPPING["config"], _PLAIN[architecture]
    if architecture == "llama" and file.metadata.get("general.name") == "mistral":
        known = "mistral"
    fields: dict[str, Any] = {
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.tensors),
        **GGUF_CONFIG_DEFAULTS_MAPPING.get(known, {}),
    }
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        renamed = tables.get(known if prefix == architecture else prefix, {}).get(name)
        if renamed is not None and renamed != -1:
            fields[renamed] = known if renamed == "model_type" else value
    if fields["model_type"] == "gemma3":  # a file holds the text model only
        fields["model_type"] = "gemma3_text"
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in fields and isinstance(tokens, ArrayOfStrings):
        fields["vocab_size"] = tokens.count
    return fields


def _dtype(file: GgufFile) -> torch.dtype:
    if any(tensor.quantised for tensor in file.tensors):
        return torch.bfloat16
    names = {tensor.kind.name for tensor in file.tensors}
    return torch.bfloat16 if "BF16" in names else torch.float16 if "F16" in names else torch.float32
