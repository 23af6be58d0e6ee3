"""The two recurrences as the core knows them: how they are found, what they keep, what runs them, how they divide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_core.api import Mixer, OpCall, Resource, ShardRule
from ad_mamba.cache import scan_state, ssd_state
from ad_mamba.kernels.native_ssd import NativeSSD
from ad_mamba.kernels.torch_scan import TorchScan
from ad_mamba.kernels.torch_ssd import TorchSSD
from ad_mamba.kernels.triton_slots import TritonScan, TritonSSD
from ad_mamba.match import ChunkScanSeam, SelectiveScanSeam
from ad_mamba.op import scan, ssd
from ad_mamba.shard import CHANNELS, GROUPS


class SelectiveScan(Mixer):
    """Mamba-1: a decay of its own for every channel and state element."""

    name = "mamba.scan"
    op = scan.selective_scan
    roles = scan.ROLES
    matchers = (SelectiveScanSeam(),)
    kernels = (TorchScan(), TritonScan())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return scan_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (CHANNELS,)


class SSD(Mixer):
    """Mamba-2: one decay a head, so that a chunk is a few matrix products."""

    name = "mamba.ssd"
    op = ssd.ssd
    roles = ssd.ROLES
    matchers = (ChunkScanSeam(),)
    kernels = (TorchSSD(), NativeSSD(), TritonSSD())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return ssd_state(call)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (GROUPS,)
