"""Attention of every token over its own choice of paged keys and values, in Triton. Needs triton only when run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ad_attention.kernels.triton_device import refuse_cpu, unsupported
from ad_attention.kernels.triton_tiles import MAX_HEAD_DIM, num_splits
from ad_core.api import BufferSpec, Declined, Environment, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::selected_triton(Tensor query, Tensor key, Tensor value, Tensor selected, *, Tensor(a!) key_pages, "
    "Tensor(b!) value_pages, Tensor cu_seqlens, Tensor context_lens, Tensor page_table, Tensor token_slots, Tensor(c!)? partial_output, "
    "Tensor(d!)? partial_lse, bool append, float scale, Tensor? sinks=None) -> Tensor"
)
"""The canonical arguments on packed tokens (query [1, T, H, D] ...), and what `ad_attention::attention_triton` has of the same name.

Returns [1, T, H, V], contiguous, in the query's dtype; rows past `cu_seqlens[B]` are zero.
"""


def _selected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selected: torch.Tensor, **arguments: Any) -> torch.Tensor:
    refuse_cpu(query, "ad_attention::selected_triton")
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_attention.kernels.triton_launch import attention

    return attention(query, key, value, selected=selected, key_bias_pages=None, distance_buckets=None, **arguments)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


selected_triton = define_op(SCHEMA, _selected, _fake)


class TritonSelected(Kernel):
    """The decode kernel of softmax attention, on lists of keys: split for single tokens, whole for those of a chunk.
    Every launch depends on shapes only, so a CUDA graph may hold any step."""

    name = "attention.selected.triton"
    target = "ad_attention::selected"
    op = "ad_attention::selected_triton"
    priority = 100
    devices = frozenset({"cuda", "cpu"})
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if (declined := unsupported(environment)) is not None:
            return declined
        widest = max(int(call["query"].shape[3]), int(call["value"].shape[3]))
        return Declined(f"a head of {widest} does not fit the registers; {MAX_HEAD_DIM} is the largest") if widest > MAX_HEAD_DIM else None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        splits = num_splits(int(call["selected"].shape[2]))
        if splits == 1:
            return {}
        heads, width = int(call["query"].shape[2]), int(call["value"].shape[3])
        return {
            "partial_output": BufferSpec((limits.max_sequences, heads, splits, width), torch.float32),
            "partial_lse": BufferSpec((limits.max_sequences, heads, splits), torch.float32),
        }

    def group_key(self, call: OpCall) -> Hashable:
        return (int(call["query"].shape[2]), int(call["value"].shape[3]), int(call["selected"].shape[2]))
