"""Softmax attention over paged keys and values in Triton: what the core must know to choose it. Needs triton only when run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ad_attention.kernels.distance import distance_buckets, parse_rule
from ad_attention.kernels.triton_device import refuse_cpu, unsupported
from ad_attention.kernels.triton_tiles import MAX_HEAD_DIM, num_splits
from ad_core.api import BufferSpec, Declined, Environment, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

if TYPE_CHECKING:
    from ad_core.api import BatchView

SCHEMA = """ad_attention::attention_triton(
    Tensor query, Tensor key, Tensor value, *,
    Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)? key_bias_pages,
    Tensor cu_seqlens, Tensor context_lens, Tensor page_table, Tensor token_slots,
    Tensor(d!)? partial_output, Tensor(e!)? partial_lse, Tensor? distance_buckets, bool append,
    float scale, int? window=None, int? chunk=None, float? softcap=None, Tensor? sinks=None, Tensor? alibi_slopes=None,
    Tensor? rel_bias=None, str rel_bias_rule="", Tensor? key_bias=None, Tensor? distance_bias=None, Tensor? query_sinks=None) -> Tensor"""
"""The canonical arguments on packed tokens (query [1, T, H, D], key [1, T, G, D], value [1, T, G, DV]), and:

* pools `key_pages` [pages, page_size, G, D], `value_pages` [..., G, DV], `key_bias_pages` [..., G]: written at `token_slots` if
  `append`, then read through `page_table` [B, P];
* `partial_output` [max_sequences, H, S, DV] and `partial_lse` [max_sequences, H, S], float32: scratch for keys that are cut into
  S splits. What they hold between calls means nothing. None if S is 1;
* `distance_buckets`: see `ad_attention.kernels.distance`; None if `rel_bias` is indexed by distance itself.

Returns [1, T, H, DV], contiguous, in query's dtype; rows past `cu_seqlens[B]` are zero.
"""


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: Any) -> torch.Tensor:
    refuse_cpu(query, "ad_attention::attention_triton")
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_attention.kernels import triton_launch

    arguments.pop("rel_bias_rule", None)
    return triton_launch.attention(query, key, value, **arguments)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


attention_triton = define_op(" ".join(SCHEMA.split()).replace("( ", "("), _attention, _fake)


class TritonPaged(Kernel):
    """Split-KV decode and variable-length prefill. Every launch depends on shapes only, so a CUDA graph may hold any step."""

    name = "attention.softmax.triton"
    target = "ad_attention::attention"
    op = "ad_attention::attention_triton"
    priority = 100
    devices = frozenset({"cuda", "cpu"})
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if (declined := unsupported(environment)) is not None:
            return declined
        widest = max(int(call["query"].shape[-1]), int(call["value"].shape[-1]))
        if widest > MAX_HEAD_DIM:
            return Declined(f"a head of {widest} does not fit the registers; {MAX_HEAD_DIM} is the largest")
        rule = parse_rule(call["rel_bias_rule"]) if call["rel_bias"] is not None else None
        return rule if isinstance(rule, Declined) else None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        specs = {}
        splits = num_splits(min(limits.max_model_len, _reach(call) or limits.max_model_len))
        if splits > 1:
            H, DV = int(call["query"].shape[2]), int(call["value"].shape[3])
            specs["partial_output"] = BufferSpec((limits.max_sequences, H, splits, DV), torch.float32)
            specs["partial_lse"] = BufferSpec((limits.max_sequences, H, splits), torch.float32)
        buckets = _buckets(call)
        if buckets is not None:
            specs["distance_buckets"] = BufferSpec(tuple(buckets.shape), torch.int64)
        return specs

    def group_key(self, call: OpCall) -> Hashable:
        shapes = (int(call["query"].shape[2]), int(call["value"].shape[3]), _reach(call))
        return shapes if call["rel_bias"] is None else (*shapes, call["rel_bias_rule"], int(call["rel_bias"].shape[1]))

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        buckets = _buckets(call)
        if buckets is not None:
            out["distance_buckets"].copy_(buckets, non_blocking=True)


def _reach(call: OpCall) -> int | None:
    """How many keys a query can see, None if all."""
    limits = [limit for limit in (call["window"], call["chunk"]) if limit is not None]
    return min(limits) if limits else None


def _buckets(call: OpCall) -> torch.Tensor | None:
    return None if call["rel_bias"] is None else distance_buckets(call["rel_bias_rule"], int(call["rel_bias"].shape[1]))
