"""Delta rules as the core knows them: how they are found, what they keep, what runs them, how they divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_core.api import Mixer, OpCall, Resource, ShardRule
from ad_deltanet.cache import state_resource
from ad_deltanet.kernels.torch_ref import TorchGatedDelta, TorchKda
from ad_deltanet.kernels.triton_slots import TritonGatedDelta, TritonKda
from ad_deltanet.match import ChunkGatedDelta, ChunkKda
from ad_deltanet.op import ROLES, gated_delta, kda
from ad_deltanet.shard import GATED_HEADS, KDA_HEADS


class GatedDelta(Mixer):
    """The delta rule, plain or with a decay by head."""

    name = "deltanet.gated_delta"
    op = gated_delta
    roles = ROLES
    matchers = (ChunkGatedDelta(),)
    kernels = (TorchGatedDelta(), TritonGatedDelta())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return state_resource(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (GATED_HEADS,)


class KimiDelta(Mixer):
    """The delta rule with a decay by channel (Kimi delta attention)."""

    name = "deltanet.kda"
    op = kda
    roles = ROLES
    matchers = (ChunkKda(),)
    kernels = (TorchKda(), TritonKda())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return state_resource(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (KDA_HEADS,)
