"""Entries of blocks over states in slots, in plain torch.

A weighted mean is kept as two numbers a feature, the mean and the logarithm of its weight, and two such join to one: a block that was cut
goes on with what it has so far as if that were one token.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_attention::compress_torch(Tensor x, Tensor? gate, Tensor? bias, int every, bool overlap, Tensor(a!) sums, Tensor positions, "
    "Tensor chunks, Tensor slots) -> Tensor"
)


class Chunk(NamedTuple):
    """A row of `chunks` after the first, which has the number of decodes and that of chunks: one sequence of more than one token."""

    token: int
    size: int
    slot: int
    context: int


class Means(NamedTuple):
    """Weighted means [..., C] and the logarithms of their weights. Without weight (-inf) the mean is 0."""

    log_weight: torch.Tensor
    mean: torch.Tensor

    def part(self, features: slice) -> Means:
        return Means(self.log_weight[..., features], self.mean[..., features])

    def where_not(self, empty: torch.Tensor) -> Means:
        """Without what was there where `empty`."""
        return Means(self.log_weight.masked_fill(empty, -torch.inf), self.mean.masked_fill(empty, 0))


def joined(dim: int, log_weight: torch.Tensor, mean: torch.Tensor) -> Means:
    """All means along `dim` as one."""
    peak = log_weight.amax(dim, keepdim=True).clamp_(min=torch.finfo(mean.dtype).min)
    weights = torch.exp(log_weight - peak)
    total = weights.sum(dim)
    # of nothing but what has no weight the mean is 0 / 1
    return Means(torch.log(total).add_(peak.squeeze(dim)), (weights * mean).sum(dim).div_(torch.where(total == 0, 1, total)))


def both(one: Means, other: Means) -> Means:
    return joined(0, *(torch.stack(pair) for pair in zip(one, other, strict=True)))


def _compress(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    every: int,
    overlap: bool,
    sums: torch.Tensor,
    positions: torch.Tensor,
    chunks: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, C] -> [1, T, C or C / 2].

    Reads and writes the step's slots of `sums` [slots, 2, C or 3C / 2]. Rows past the batch's tokens are zero.
    """
    decodes, count = chunks[0, :2].tolist()
    width = x.shape[2] // 2 if overlap else x.shape[2]
    out = x.new_zeros(1, x.shape[1], width)
    tokens = _tokens(x[0], gate, bias, positions, every, sums.dtype)
    if decodes:
        before = sums.index_select(0, slots[:decodes])
        part = Means(*(each[:decodes] for each in tokens))
        entries, after = _decode(part, Means(before[:, 0], before[:, 1]), positions[:decodes, None], every, width, overlap)
        out[0, :decodes] = entries
        sums.index_copy_(0, slots[:decodes], torch.stack(after, 1))
    for chunk in (Chunk(*record) for record in chunks[1 : count + 1].tolist()):
        rows = slice(chunk.token, chunk.token + chunk.size)
        part, so_far = Means(*(each[rows] for each in tokens)), Means(*sums[chunk.slot])
        entries, after = _chunk(part, so_far, chunk.context, every, width, overlap)
        out[0, rows][every - 1 - chunk.context % every :: every] = entries.to(x.dtype)
        sums[chunk.slot] = torch.stack(after)
    return out


def _tokens(
    x: torch.Tensor, gate: torch.Tensor | None, bias: torch.Tensor | None, positions: torch.Tensor, every: int, dtype: torch.dtype
) -> Means:
    """Each token as a mean of one: [T, C]."""
    logits = torch.zeros_like(x, dtype=dtype) if gate is None else gate[0].to(dtype)
    if bias is not None:
        logits = logits + bias.to(dtype).index_select(0, positions % every)
    return Means(logits, x.to(dtype))


def _decode(token: Means, before: Means, positions: torch.Tensor, every: int, width: int, overlap: bool) -> tuple[torch.Tensor, Means]:
    """One token [n, C] of n sequences: entries [n, width], zero where no block ends, and the sums after it."""
    features = token.mean.shape[1]
    begins, ends = positions % every == 0, positions % every == every - 1
    current = both(before.part(slice(0, features)).where_not(begins), token)
    if not overlap:
        return current.mean.masked_fill(~ends, 0), current
    last = Means(*(torch.where(begins, a[:, :width], a[:, features:]) for a in before)).where_not(positions < every)
    entries = both(last, current.part(slice(width, None))).mean.masked_fill(~ends, 0)
    return entries, _stored(current, last)


def _chunk(tokens: Means, before: Means, context: int, every: int, width: int, overlap: bool) -> tuple[torch.Tensor, Means]:
    """Tokens [n, C] of one sequence: the entries of the blocks that end among them [blocks, width], and the sums after them."""
    size, features = tokens.mean.shape
    inside = context % every
    current = before.part(slice(0, features))
    # what the current block has so far takes the place of its last token; before and after it is nothing
    front, back = max(0, inside - 1), -(inside + size) % every

    def by_block(so_far: torch.Tensor, new: torch.Tensor, nothing: float) -> torch.Tensor:
        rows = torch.cat([so_far[None], new]) if inside else new
        return F.pad(rows, (0, 0, front, back), value=nothing).unflatten(0, (-1, every))

    blocks = joined(1, *map(by_block, current, tokens, (-torch.inf, 0.0)))  # [blocks, C]
    complete = (inside + size) // every
    if not overlap:
        return blocks.mean[:complete], Means(*(each[-1] for each in blocks))
    first = before.part(slice(features, None) if inside else slice(0, width))
    if context < every:
        first = Means(torch.full_like(first.log_weight, -torch.inf), torch.zeros_like(first.mean))
    last = Means(*(torch.cat([one[None], each[:-1, :width]]) for one, each in zip(first, blocks, strict=True)))
    entries = both(last, blocks.part(slice(width, None))).mean[:complete]
    return entries, _stored(*(Means(*(each[-1] for each in means)) for means in (blocks, last)))


def _stored(current: Means, last: Means) -> Means:
    """As `sums` has it: the current block, and behind it what is left of the one before."""
    return Means(*(torch.cat(pair, -1) for pair in zip(current, last, strict=True)))


def _fake(x: torch.Tensor, gate: torch.Tensor | None, bias: torch.Tensor | None, every: int, overlap: bool, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:2], x.shape[2] // 2 if overlap else x.shape[2])


compress_torch = define_op(SCHEMA, _compress, _fake)


class TorchCompress(Kernel):
    """Two numbers a feature, whatever the length of a block."""

    name = "attention.compress.torch"
    target = "ad_attention::compress"
    op = "ad_attention::compress_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return {
            "chunks": BufferSpec((limits.max_sequences + 1, len(Chunk._fields)), torch.int64, "host"),
            "slots": BufferSpec((limits.max_sequences,), torch.int64),
        }

    def group_key(self, call: OpCall) -> Hashable:
        return ()

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        bounds, slots, contexts = (batch.host(name) for name in ("cu_seqlens", "state_slots", "context_lens"))
        records = torch.stack([bounds[:-1], bounds.diff(), slots, contexts], 1)[batch.num_decodes :]
        records = records[records[:, 1] > 0]
        out["chunks"][0, :2] = torch.tensor([batch.num_decodes, len(records)])
        out["chunks"][1 : len(records) + 1] = records
        out["slots"][: batch.num_decodes].copy_(slots[: batch.num_decodes])
