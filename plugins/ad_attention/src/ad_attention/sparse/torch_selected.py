"""Attention of every token over its own choice of paged keys and values, in plain torch: prefill and decode are the same here."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_attention.kernels.row_plan import GROUP_ROWS, RowPlan, plan_rows, row_buffers
from ad_attention.kernels.sinks import softmax_with_sinks
from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::selected_torch(Tensor query, Tensor key, Tensor value, Tensor selected, float scale, Tensor? sinks, bool append, "
    "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor page_table, Tensor positions, Tensor plan, Tensor records, Tensor slots, "
    "Tensor rows, Tensor bounds, Tensor index) -> Tensor"
)


def _selected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    selected: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    append: bool,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    positions: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    bounds: torch.Tensor,
    index: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: query [1, T, H, D] ... -> [1, T, H, V]. Writes the step's keys and values to the pools if
    `append`, and then reads K rows a token from there. Rows past the batch's tokens are zero."""
    step = RowPlan(plan, records, slots, bounds, index)
    if append:
        step.write(key_pages, key[0])
        step.write(value_pages, value[0])
    heads, groups = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(1, query.shape[1], heads, value.shape[3])
    block = max(1, GROUP_ROWS // (selected.shape[2] * groups))
    for start in range(0, step.tokens, block):
        part = slice(start, min(start + block, step.tokens))
        wanted, last = selected[0, part].long(), positions[part, None]
        hidden = (wanted < 0) | (wanted > last)
        found = step.slots_at(torch.minimum(wanted.clamp(min=0), last), rows[part], page_table).flatten()
        keys, values = (
            pool.flatten(0, 1).index_select(0, found).view(-1, wanted.shape[1], *pool.shape[2:]).to(dtype).transpose(1, 2)
            for pool in (key_pages, value_pages)
        )  # [n, G, K, D]
        scores = (query[0, part].to(dtype).mul(scale).unflatten(1, (groups, -1)) @ keys.transpose(2, 3)).flatten(1, 2)
        scores.masked_fill_(hidden[:, None], -torch.inf)
        weights = softmax_with_sinks(scores, sinks)
        out[0, part] = (weights.unflatten(1, (groups, -1)) @ values).flatten(1, 2)
    out[0, step.tokens :].zero_()
    return out


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


selected_torch = define_op(SCHEMA, _selected, _fake)


class TorchSelected(Kernel):
    """Gathers what each token chose."""

    name = "attention.selected.torch"
    target = "ad_attention::selected"
    op = "ad_attention::selected_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return row_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_rows(batch, None, out)
