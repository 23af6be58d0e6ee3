"""Choosing tokens by index scores over paged index keys, in Triton. Needs triton only when run."""

from __future__ import annotations

from typing import Any

import torch

from ad_attention.kernels.triton_device import refuse_cpu, unsupported
from ad_core.api import Declined, Environment, Kernel, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::select_triton(Tensor query, Tensor key, Tensor weight, *, int count, float scale, bool append, Tensor(a!) index_pages, "
    "Tensor page_table, Tensor cu_seqlens, Tensor context_lens, Tensor token_slots) -> Tensor"
)
"""The canonical arguments on packed tokens (query [1, T, I, D] ...), and the pool `index_pages` [pages, page_size, D]: the step's keys are
written at `token_slots` if `append`, and the sequences then read through `page_table`.

Returns [1, T, count] int64; rows past `cu_seqlens[B]` are zero.
"""

MAX_HEADS, MAX_HEADS_FLOAT32, MAX_HEAD_DIM = 128, 64, 256


def _select(query: torch.Tensor, *arguments: torch.Tensor, **named: Any) -> torch.Tensor:
    refuse_cpu(query, "ad_attention::select_triton")
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_attention.sparse.triton_launch import select

    return select(query, *arguments, **named)


def _fake(query: torch.Tensor, *_: object, count: int, **__: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], count, dtype=torch.int64)


select_triton = define_op(SCHEMA, _select, _fake)


class TritonSelect(Kernel):
    """A kernel scores every key that a token sees, PyTorch ranks rows of the longest sequence's length. Every launch depends on shapes
    only, so a CUDA graph may hold any step."""

    name = "attention.select.triton"
    target = "ad_attention::select"
    op = "ad_attention::select_triton"
    priority = 100
    devices = frozenset({"cuda", "cpu"})
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if (declined := unsupported(environment)) is not None:
            return declined
        if call["every"] != 1:
            return Declined(f"it chooses among tokens, not among blocks of {call['every']}")
        heads, width = (int(size) for size in call["query"].shape[2:])
        most = MAX_HEADS_FLOAT32 if call["query"].dtype == torch.float32 else MAX_HEADS
        if heads > most or width > MAX_HEAD_DIM:
            return Declined(f"{heads} index heads of {width} do not fit the registers; {most} of {MAX_HEAD_DIM} are the most")
        return None
