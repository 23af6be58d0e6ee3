"""Latent attention over paged latents in Triton: what the core must know to choose it. Needs triton only when run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ad_attention.kernels.triton_device import refuse_cpu, unsupported
from ad_attention.latent.triton_tiles import MAX_LATENT, MAX_ROPE, latent_splits
from ad_core.api import BufferSpec, Declined, Environment, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

SCHEMA = (
    "ad_attention::mla_triton(Tensor q_nope, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor up_weight, *, Tensor(a!) latent_pages, "
    "Tensor cu_seqlens, Tensor context_lens, Tensor page_table, Tensor token_slots, Tensor(b!)? partial_output, Tensor(c!)? partial_lse, "
    "bool append, float scale, int? window=None, Tensor? sinks=None, Tensor? selected=None) -> Tensor"
)
"""The canonical arguments on packed tokens (q_nope [1, T, H, N] ...), and:

* the pool `latent_pages` [pages, page_size, R + P]: latent and k_rope are written at `token_slots` if `append`, then read through
  `page_table`;
* `partial_output` [max_sequences, H, S, R] and `partial_lse` [max_sequences, H, S], float32: scratch for keys that are cut into S splits.
  What they hold between calls means nothing. None if S is 1.

Returns [1, T, H, V], contiguous, in the query's dtype; rows past `cu_seqlens[B]` are zero.
"""


def _mla(q_nope: torch.Tensor, *arguments: torch.Tensor, **named: Any) -> torch.Tensor:
    refuse_cpu(q_nope, "ad_attention::mla_triton")
    # Here and not above: a machine without triton can still list this kernel and read why it is not used.
    from ad_attention.latent.triton_launch import latent_attention

    return latent_attention(q_nope, *arguments, **named)


def _fake(
    q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, up_weight: torch.Tensor, **_: Any
) -> torch.Tensor:
    heads, features = q_nope.shape[2:]
    return q_nope.new_empty(*q_nope.shape[:2], heads, up_weight.shape[0] // heads - features)


mla_triton = define_op(SCHEMA, _mla, _fake)


class TritonLatent(Kernel):
    """Absorbed at any length: split-KV for single tokens, blocks of tokens for chunks, a row's own choice of keys for sparse attention.
    Every launch depends on shapes only, so a CUDA graph may hold any step."""

    name = "attention.mla.triton"
    target = "ad_attention::mla"
    op = "ad_attention::mla_triton"
    priority = 100
    devices = frozenset({"cuda", "cpu"})
    requires = ("triton>=3.6",)
    graph = "full"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if (declined := unsupported(environment)) is not None:
            return declined
        latent, rope = int(call["latent"].shape[2]), int(call["k_rope"].shape[2])
        if latent > MAX_LATENT or rope > MAX_ROPE:
            return Declined(f"{latent} + {rope} features a token do not fit an SM; {MAX_LATENT} + {MAX_ROPE} are the largest")
        dtypes = {str(call[name].dtype).removeprefix("torch.") for name in ("q_nope", "latent", "up_weight")}
        return Declined(f"tokens and weight are of different dtypes ({', '.join(sorted(dtypes))})") if len(dtypes) > 1 else None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        heads, latent = int(call["q_nope"].shape[2]), int(call["latent"].shape[2])
        splits = latent_splits(min(limits.max_model_len, _reach(call) or limits.max_model_len), heads, latent, limits.max_sequences)
        if splits == 1:
            return {}
        return {
            "partial_output": BufferSpec((limits.max_sequences, heads, splits, latent), torch.float32),
            "partial_lse": BufferSpec((limits.max_sequences, heads, splits), torch.float32),
        }

    def group_key(self, call: OpCall) -> Hashable:
        return (int(call["q_nope"].shape[2]), int(call["latent"].shape[2]), _reach(call))


def _reach(call: OpCall) -> int | None:
    """How many keys a query is held against at most, None if all."""
    return call["window"] if call["selected"] is None else int(call["selected"].shape[2])
