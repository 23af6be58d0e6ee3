"""Softmax attention as the core knows it: how it is found, what it keeps, what runs it, how it divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_attention.cache import page_resources
from ad_attention.kernels.native_paged import NativePaged
from ad_attention.kernels.torch_ref import TorchPaged
from ad_attention.kernels.triton_paged import TritonPaged
from ad_attention.match import MATCHERS, SEAMS
from ad_attention.op import ROLES, attention
from ad_attention.shard import HEADS
from ad_core.api import Mixer, OpCall, Resource, ShardRule


class Attention(Mixer):
    """MHA, GQA and MQA, causal, with windows, chunks, soft-cap, sinks and biases by distance or by key."""

    name = "attention.softmax"
    op = attention
    roles = ROLES
    matchers = (*SEAMS, *MATCHERS)
    kernels = (TorchPaged(), NativePaged(), TritonPaged())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return page_resources(call)

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        # Layers that attend to one pair of key and value share its pages, if they keep them equally long.
        return ("key", "value", "key_bias", "window", "chunk")

    def shard_rules(self) -> Sequence[ShardRule]:
        return (HEADS,)
