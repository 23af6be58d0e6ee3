"""Tiny GGUF files, as llama.cpp's converter writes them: its names, its order of the rows of q and k."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

TYPES = gguf.GGMLQuantizationType

LLAMA = {
    "context_length": 64, "block_count": 2, "feed_forward_length": 96, "embedding_length": 64, "rope.dimension_count": 16,
    "rope.freq_base": 10000.0, "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip

KEYS = {
    "llama": {**LLAMA, "vocab_size": 48},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "attention.key_length": 16, "attention.value_length": 16},
    "qwen3moe": {**LLAMA, "attention.key_length": 16, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96},
    "phi3": LLAMA,
    "gemma2": {**LLAMA, "attention.key_length": 16, "attention.sliding_window": 8},
    "gemma3": {**LLAMA, "attention.key_length": 16, "attention.sliding_window": 8},
    "starcoder2": {**LLAMA, "attention.layer_norm_epsilon": 1e-5},
    "nemotron": LLAMA,
    "gpt2": {"context_length": 1024, "block_count": 2, "feed_forward_length": 256, "embedding_length": 64, "attention.head_count": 4,
             "attention.layer_norm_epsilon": 1e-5},
    "falcon": LLAMA,
}  # fmt: skip


def layer_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Of one layer. Where transformers reads a size from no key of the file, it is the default of its configuration."""
    if kind == "gpt2":
        return {
            "attn_norm.weight": (64,), "attn_norm.bias": (64,), "attn_qkv.weight": (192, 64), "attn_qkv.bias": (192,),
            "attn_output.weight": (64, 64), "attn_output.bias": (64,), "ffn_norm.weight": (64,), "ffn_norm.bias": (64,),
            "ffn_up.weight": (256, 64), "ffn_up.bias": (256,), "ffn_down.weight": (64, 256), "ffn_down.bias": (64,),
        }  # fmt: skip
    head = 128 if kind == "qwen3" else 16
    shapes = {
        "attn_norm.weight": (64,), "ffn_norm.weight": (64,), "attn_q.weight": (4 * head, 64), "attn_k.weight": (2 * head, 64),
        "attn_v.weight": (2 * head, 64), "attn_output.weight": (64, 4 * head),
    }  # fmt: skip
    if kind == "qwen3moe":
        shapes |= {"ffn_gate_inp.weight": (4, 64), "ffn_down_exps.weight": (4, 64, 768)}
        shapes |= {"ffn_gate_exps.weight": (4, 768, 64), "ffn_up_exps.weight": (4, 768, 64)}
    else:
        shapes |= {"ffn_gate.weight": (96, 64), "ffn_up.weight": (96, 64), "ffn_down.weight": (64, 96)}
    if kind == "gemma2":
        shapes |= {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
    if kind in ("qwen3", "qwen3moe"):
        shapes |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    if kind == "qwen2":
        shapes |= {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
    return shapes


def write(path: Path, kind: str = "llama", quant: TYPES = TYPES.F32, *, tied: bool = True, tokens: int = 48, **metadata: object) -> Path:
    """A file of a tiny model with random weights; matrices are stored as `quant`, vectors as float32."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    for key, value in KEYS[kind].items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{kind}.{key}", value)
    vocabulary = ["<unk>", "<s>", "</s>", "0", "ab", *(chr(97 + index % 26) + "0" * (index // 26) for index in range(tokens - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (tokens - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    shapes = {"token_embd.weight": (48, 64), "output_norm.weight": (64,)}
    if kind == "gpt2":
        shapes |= {"output_norm.bias": (64,), "position_embd.weight": (1024, 64)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(2) for name, shape in layer_shapes(kind).items()}
    shapes |= {} if tied else {"output.weight": (48, 64)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
