"""The canonical ops of compressed attention, over one whole sequence: what stands for a block of tokens, and attention over such entries.

Block w is tokens w * every to (w + 1) * every - 1. Its entry is carried by the last of them, so that whatever a model does to entries one
by one (norms, rotary embeddings) is done to tokens, and an entry is there as soon as its block is complete.
"""

from __future__ import annotations

import torch

from ad_attention.latent.op import chosen_keys
from ad_core.api import Role
from ad_core.graph.ops import define_op

ROW_BLOCK = 256
"""Query rows that are scored at once: no S x S matrix of a long sequence ever exists."""

COMPRESS_SCHEMA = "ad_attention::compress(Tensor x, Tensor? gate=None, Tensor? bias=None, *, int every, bool overlap=False) -> Tensor"
COMPRESS_ROLES = {"x": Role.TOKEN, "gate": Role.TOKEN, "bias": Role.PARAM, "every": Role.CONST, "overlap": Role.CONST}

COMPRESSED_SCHEMA = (
    "ad_attention::compressed(Tensor query, Tensor key, Tensor entry, Tensor? selected=None, Tensor? sinks=None, *, float scale, "
    "int window, int every) -> Tensor"
)
COMPRESSED_ROLES = {
    "query": Role.TOKEN,
    "key": Role.TOKEN,
    "entry": Role.TOKEN,
    "selected": Role.TOKEN,
    "sinks": Role.PARAM,
    "scale": Role.CONST,
    "window": Role.CONST,
    "every": Role.CONST,
}


def compress_reference(
    x: torch.Tensor, gate: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, every: int, overlap: bool = False
) -> torch.Tensor:
    """x [B, S, C] -> [B, S, C]: at the last token of each block the block's entry, zeros elsewhere.

    The entry is the weighted mean of the block's tokens, feature by feature; the weights are the softmax over these tokens of `gate`
    [B, S, C] + `bias` [every, C] at the token's place in its block. Without both it is the mean.

    With `overlap`, x has 2D features and an entry D: of the block before the first D features, if there is one, and of its own block the
    others, weighed together. Half precision is computed in float32. DeepSeek-AI (2026), DeepSeek-V4: compressors of CSA and HCA.
    """
    batch, length, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    width = width // 2 if overlap else width
    out = x.new_zeros(batch, length, width)
    blocks = length // every
    if blocks == 0:
        return out
    values = x[:, : blocks * every].to(dtype).unflatten(1, (blocks, every))  # [B, blocks, every, C]
    logits = torch.zeros_like(values)
    if gate is not None:
        logits = logits + gate[:, : blocks * every].to(dtype).unflatten(1, (blocks, every))
    if bias is not None:
        logits = logits + bias.to(dtype)
    if overlap:
        before, weighed = torch.zeros_like(values[..., :width]), torch.full_like(values[..., :width], -torch.inf)
        before[:, 1:], weighed[:, 1:] = values[:, :-1, :, :width], logits[:, :-1, :, :width]
        values = torch.cat([before, values[..., width:]], 2)
        logits = torch.cat([weighed, logits[..., width:]], 2)
    out[:, every - 1 : blocks * every : every] = (logits.softmax(2) * values).sum(2).to(x.dtype)
    return out


def compress_fake(
    x: torch.Tensor, gate: torch.Tensor | None = None, bias: torch.Tensor | None = None, *, every: int, overlap: bool = False
) -> torch.Tensor:
    """[B, S, C], or half as wide with `overlap`."""
    return x.new_empty(*x.shape[:2], x.shape[2] // 2 if overlap else x.shape[2])


def compressed_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    entry: torch.Tensor,
    selected: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    window: int,
    every: int,
) -> torch.Tensor:
    """Attention of query [B, S, H, D] over the last tokens and over the entries of all blocks -> [B, S, H, D].

    Token i sees key [B, S, D] at i - window < j <= i and, at the last token of each block, entry [B, S, D], if that is not after i;
    with `selected` [B, S, K] only those of the blocks that it lists for i (negative: none). One softmax goes over both. What is
    seen is key and value in one, for all heads. `sinks` [H] is one more score a row, with no value. Half precision is computed in
    float32. DeepSeek-AI (2026), DeepSeek-V4: compressed sparse and heavily compressed attention.
    """
    length = query.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).transpose(1, 2) * scale  # [B, H, S, D]
    keys, entries = key.to(dtype)[:, None], entry[:, every - 1 :: every].to(dtype)[:, None]  # [B, 1, S or blocks, D]
    steps, blocks = torch.arange(length, device=query.device), torch.arange(entries.shape[2], device=query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start in range(0, length, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, length)
        seen = slice(max(0, start - window + 1), stop)
        rows = steps[start:stop, None]
        recent = q[:, :, start:stop] @ keys[:, :, seen].transpose(2, 3)
        recent = recent.masked_fill((steps[seen] > rows) | (steps[seen] <= rows - window), -torch.inf)
        distant = (q[:, :, start:stop] @ entries.transpose(2, 3)).masked_fill(blocks >= (rows + 1) // every, -torch.inf)
        if selected is not None:
            chosen = chosen_keys(selected[:, start:stop].long(), len(blocks))
            distant = distant.masked_fill(~chosen[:, None], -torch.inf)
        scores = torch.cat([recent, distant], -1)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights, near = scores.softmax(-1), recent.shape[3]
        mixed = weights[..., :near] @ keys[:, :, seen] + weights[..., near : near + len(blocks)] @ entries
        out[:, start:stop] = mixed.transpose(1, 2)
    return out


def compressed_fake(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, H, D], contiguous, of the query's dtype."""
    return query.new_empty(query.shape)


compress = define_op(COMPRESS_SCHEMA, compress_reference, compress_fake)
compressed = define_op(COMPRESSED_SCHEMA, compressed_reference, compressed_fake)
