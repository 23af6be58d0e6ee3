"""Recurrences by channel as the core knows them: how they are found, what they keep, what runs them, how they divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_core.api import Mixer, OpCall, Resource, ShardRule
from ad_rnn import rg_lru, token_shift, wkv4
from ad_rnn.cache import rg_lru_state, token_shift_state, wkv4_state
from ad_rnn.kernels.torch_ref import TorchRgLru, TorchWkv4
from ad_rnn.kernels.torch_shift import TorchTokenShift
from ad_rnn.kernels.triton_slots import TritonRgLru, TritonTokenShift, TritonWkv4
from ad_rnn.match import DynamicConvolution, NGramEmbeddingSeam, PadShift, RgLruScan, WkvFunction
from ad_rnn.shard import RG_LRU_CHANNELS, TOKEN_SHIFT_CHANNELS, WKV4_CHANNELS


class RgLru(Mixer):
    """h_t = gate_t * h_{t-1} + x_t, by channel."""

    name = "rnn.rg_lru"
    op = rg_lru.rg_lru
    roles = rg_lru.ROLES
    matchers = (RgLruScan(),)
    kernels = (TorchRgLru(), TritonRgLru())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return rg_lru_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (RG_LRU_CHANNELS,)


class TokenShift(Mixer):
    """Each token's predecessor."""

    name = "rnn.token_shift"
    op = token_shift.token_shift
    roles = token_shift.ROLES
    matchers = (PadShift(), DynamicConvolution(), NGramEmbeddingSeam())
    kernels = (TorchTokenShift(), TritonTokenShift())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return token_shift_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (TOKEN_SHIFT_CHANNELS,)


class Wkv4(Mixer):
    """RWKV-4's weighted sum over the past, by channel."""

    name = "rnn.wkv4"
    op = wkv4.wkv4
    roles = wkv4.ROLES
    matchers = (WkvFunction(),)
    kernels = (TorchWkv4(), TritonWkv4())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return wkv4_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (WKV4_CHANNELS,)
