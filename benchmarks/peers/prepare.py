"""One set of weights for every engine: from a GGUF file an HF directory in bf16 and a GGUF in BF16 with the same bits.

Run as `python -m peers.prepare SOURCE.gguf TARGET` from the benchmarks folder; writes TARGET/hf, TARGET/model-bf16.gguf and
TARGET/manifest.json (the driver reads nothing else of the model). A process of its own, so that the driver never loads torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List the first five prime numbers.",
)
"""Prompts on which the engines must agree: text, because after random ids every token is nearly a tie."""


class WeightsDiffer(Exception):
    """The two files do not hold the same bits, so no comparison of engines would mean anything."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    prepare(arguments.source, arguments.target)


def prepare(source: Path, target: Path) -> None:
    """Writes both forms of the model and the manifest into `target`. Raises WeightsDiffer if they are not bit for bit the same."""
    target.mkdir(parents=True, exist_ok=True)
    directory, rewritten = target / "hf", target / "model-bf16.gguf"
    _write_directory(source, directory)
    _write_gguf(source, rewritten)
    compared = _compare(directory, rewritten)
    manifest = _manifest(directory) | {"source": source.name, "tensors_compared": compared}
    (target / "manifest.json").write_text(json.dumps(manifest))


def _write_directory(source: Path, directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # `from_pretrained(gguf_file=...)` would ask for one more library, and keeps the packed weights unless told otherwise.
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)["tensors"]
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()  # the only weight that may be left out; any other would still be on meta and could not be saved
    model.config.dtype = torch.bfloat16
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(directory)


def _write_gguf(source: Path, path: Path) -> None:
    """The same file with every matrix in BF16 and all metadata kept. Vectors stay F32, as llama.cpp wants, rounded to bf16 values."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = gguf.GGUFWriter(path, arch=architecture.contents())
    for key, held in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            is_array = held.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, held.contents(), held.types[0], sub_type=held.types[-1] if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        packed = gguf.quantize(values, bf16)  # rounds to nearest even, as torch does
        if values.ndim == 1:
            writer.add_tensor(tensor.name, gguf.dequantize(packed, bf16))
        else:
            writer.add_tensor(tensor.name, packed, raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _compare(directory: Path, rewritten: Path) -> int:
    """Compares the bits of every tensor of the GGUF with the directory's; how many there were. Raises WeightsDiffer.

    The two formats name tensors differently and order the rows of rotated projections differently, so tensors are compared as
    multisets of bits; that rows stand where they should is what the agreement of the engines' tokens shows.
    """
    import gguf

    ours = sorted(_fingerprint(bits) for bits in _directory_bits(directory))
    theirs = sorted(_fingerprint(_bf16_bits(tensor, gguf)) for tensor in gguf.GGUFReader(rewritten).tensors)
    if ours != theirs:
        raise WeightsDiffer(f"{len(ours)} tensors in {directory} and {len(theirs)} in {rewritten} are not the same bits")
    return len(ours)


def _directory_bits(directory: Path) -> list[Any]:
    import torch
    from safetensors import safe_open

    tensors = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            tensors += [weights.get_tensor(name).view(torch.uint16).numpy() for name in weights.keys()]  # noqa: SIM118
    return tensors


def _bf16_bits(tensor: Any, gguf: Any) -> Any:
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return np.ascontiguousarray(tensor.data).view(np.uint16)
    return (np.ascontiguousarray(tensor.data).view(np.uint32) >> 16).astype(np.uint16)


def _fingerprint(bits: Any) -> tuple[int, bytes]:
    counts = np.bincount(bits.ravel(), minlength=1 << 16)
    return bits.size, counts.tobytes()


def _manifest(directory: Path) -> dict[str, Any]:
    """What the driver must know: sizes for bandwidth, ids to draw prompts from, prompts to agree on."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    probes = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        for question in QUESTIONS
    ]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # The embedding is looked up, not read, unless it also is the head.
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    parameters = sum(bits.size for bits in _directory_bits(directory)) - looked_up
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "special_ids": sorted(tokenizer.all_special_ids),
        "weight_bytes_per_token": 2 * parameters,
        "kv_bytes_per_context_token": 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_size,
        "probes": [list(map(int, probe)) for probe in probes],
    }


if __name__ == "__main__":
    main()
