"""Choosing tokens by index scores over paged index keys, in plain torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch

from ad_attention.kernels.row_plan import RowPlan, plan_rows, row_buffers
from ad_attention.sparse.op import index_scores
from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::select_torch(Tensor query, Tensor key, Tensor weight, int count, float scale, int every, bool append, "
    "Tensor(a!) index_pages, Tensor page_table, Tensor plan, Tensor records, Tensor slots, Tensor rows, Tensor bounds, Tensor index, "
    "Tensor? ends) -> Tensor"
)

BLOCK_SCORES = 1 << 21
"""The most scores of one head that a block of query rows may have."""


def _select(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    count: int,
    scale: float,
    every: int,
    append: bool,
    index_pages: torch.Tensor,
    page_table: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """The canonical op on packed tokens: query [1, T, I, D] ... -> [1, T, count] positions in the token's own sequence. Writes the step's
    keys to `index_pages` if `append`, and then reads the sequences from there. Rows past the batch's tokens are zero."""
    step = RowPlan(plan, records, slots, bounds, index, ends)
    if append:
        step.write(index_pages, key[0])
    pool = index_pages.flatten(0, 1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.empty(1, query.shape[1], count, dtype=torch.int64, device=query.device)
    for group in step.groups:
        part = slice(group.start, group.start + group.size)
        keys = pool.index_select(0, step.group_slots(group, page_table)).view(group.size, group.length, key.shape[2]).to(dtype)
        scores = index_scores(query[0, part, None].to(dtype), keys, weight[0, part, None].to(dtype), scale)[:, 0]
        if (hidden := step.hidden(group)) is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        out[0, part] = best(scores, count)
    for chunk in step.prefills:
        before = pool.index_select(0, step.context_slots(chunk, page_table))
        keys = torch.cat([before, key[0, step.completed(chunk)]]).to(dtype)
        entries = torch.arange(len(keys), device=keys.device)
        visible = torch.arange(chunk.context + 1, chunk.context + chunk.size + 1, device=keys.device) // every
        size = max(1, BLOCK_SCORES // max(1, len(keys) * query.shape[2]))
        for start in range(0, chunk.size, size):
            stop = min(start + size, chunk.size)
            part = slice(chunk.token + start, chunk.token + stop)
            scores = index_scores(query[:, part].to(dtype), keys[None], weight[:, part].to(dtype), scale)[0]
            later = entries >= visible[start:stop, None]
            out[0, part] = best(scores.masked_fill(later, -torch.inf), count)
    out[0, step.tokens :].zero_()
    return out


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[n, count] of scores [n, L]: the columns of the highest, ascending, -1 in front where there are fewer than `count` above -inf.

    Of equal scores the first columns are taken, whatever is beside them in the batch: the column is part of what is compared.
    """
    length = scores.shape[1]
    kept = min(count, length)
    if scores.dtype == torch.float32:
        bits = (scores + 0.0).view(torch.int32).long()  # -0 is 0
        ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
        columns = torch.arange(length, device=scores.device)
        chosen = (ordered * length - columns).topk(kept, -1).indices
    else:
        chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :kept]
    chosen = torch.where(scores.gather(1, chosen) == -torch.inf, -1, chosen)
    return torch.nn.functional.pad(chosen.sort(-1).values, (count - kept, 0), value=-1)


def _fake(query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, count: int, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], count, dtype=torch.int64)


select_torch = define_op(SCHEMA, _select, _fake)


class TorchSelect(Kernel):
    """Scores every key of a sequence, and takes the best."""

    name = "attention.select.torch"
    target = "ad_attention::select"
    op = "ad_attention::select_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return row_buffers(limits, call["every"])

    def group_key(self, call: OpCall) -> Hashable:
        return call["every"]

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_rows(batch, None, out, call["every"])
