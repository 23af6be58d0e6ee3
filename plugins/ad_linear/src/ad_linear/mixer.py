"""Linear attention as the core knows it: how it is found, what it keeps, what runs it, how it divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_core.api import Mixer, OpCall, Resource, ShardRule
from ad_linear import lightning, mlstm
from ad_linear.cache import lightning_state, mlstm_state
from ad_linear.kernels.torch_lightning import TorchLightning
from ad_linear.kernels.torch_mlstm import TorchMLstm
from ad_linear.kernels.triton_slots import TritonLightning, TritonMLstm
from ad_linear.match import LightningAttention, MLstmBackend
from ad_linear.shard import LIGHTNING_HEADS, MLSTM_HEADS


class Lightning(Mixer):
    """Linear attention with a fixed decay a head: lightning attention, retention."""

    name = "linear.lightning"
    op = lightning.lightning
    roles = lightning.ROLES
    matchers = (LightningAttention(),)
    kernels = (TorchLightning(), TritonLightning())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return lightning_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (LIGHTNING_HEADS,)


class MLstm(Mixer):
    """The matrix memory of xLSTM, with exponential gates."""

    name = "linear.mlstm"
    op = mlstm.mlstm
    roles = mlstm.ROLES
    matchers = (MLstmBackend(),)
    kernels = (TorchMLstm(), TritonMLstm())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return mlstm_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (MLSTM_HEADS,)
