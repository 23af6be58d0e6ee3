"""The causal convolution as the core knows it: how it is found, what it keeps, what runs it, how it divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_conv.cache import conv_state
from ad_conv.kernels.native_conv import NativeSlots
from ad_conv.kernels.torch_ref import TorchSlots
from ad_conv.kernels.triton_slots import TritonSlots
from ad_conv.match import MATCHERS, SEAMS
from ad_conv.op import ROLES, causal_conv1d
from ad_conv.shard import CHANNELS
from ad_core.api import Mixer, OpCall, Resource, ShardRule


class CausalConv1d(Mixer):
    """One causal filter a channel, with or without bias and SiLU."""

    name = "conv.causal"
    op = causal_conv1d
    roles = ROLES
    matchers = (*SEAMS, *MATCHERS)
    kernels = (TorchSlots(), NativeSlots(), TritonSlots())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return conv_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (CHANNELS,)
