"""Compressed attention as the core knows it: two mixers, since a model's own norms and rotary embeddings stand between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ad_attention.compressed.op import COMPRESS_ROLES, COMPRESSED_ROLES, compress, compressed
from ad_attention.compressed.torch_compress import TorchCompress
from ad_attention.compressed.torch_compressed import TorchCompressed
from ad_core.api import Mixer, OpCall, PagedTokens, Resource, ShardRule, SlotState

HEADS = ShardRule(
    op="ad_attention::compressed",
    axis="tensor",
    splits={"query": 2, "sinks": 0},
    output=2,
    divides="num_heads",
)
"""By heads: keys and entries are the same for all."""


class Compress(Mixer):
    """What stands for a block of tokens: their mean, weighed by gates."""

    name = "attention.compress"
    op = compress
    roles = COMPRESS_ROLES
    kernels = (TorchCompress(),)

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        """The logarithm of the weight so far and the mean, of the current block and, where blocks overlap, of a part of the one before."""
        width = int(call["x"].shape[2])
        width += width // 2 if call["overlap"] else 0
        return {"sums": SlotState((2, width), torch.promote_types(call["x"].dtype, torch.float32))}


class Compressed(Mixer):
    """Softmax attention over the last tokens and the entries of all blocks, or of chosen ones."""

    name = "attention.compressed"
    op = compressed
    roles = COMPRESSED_ROLES
    kernels = (TorchCompressed(),)

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        """`recent`: the key of the token at position p lies at p modulo the window."""
        key, entry = call["key"], call["entry"]
        return {
            "recent": SlotState((call["window"], int(key.shape[2])), key.dtype),
            "entry_pages": PagedTokens((int(entry.shape[2]),), entry.dtype, every=call["every"]),
        }

    def shard_rules(self) -> Sequence[ShardRule]:
        return (HEADS,)
