"""Routed experts as the core knows them: ops that keep no memory, how they are found, what runs them, how they divide."""

from __future__ import annotations

from collections.abc import Sequence

from ad_core.api import CanonicalOp, ShardRule
from ad_moe.kernels.native_moe import NativeExperts, NativeRoutedLinear
from ad_moe.kernels.torch_ref import TorchExperts, TorchRoutedLinear
from ad_moe.kernels.triton_moe import TritonExperts, TritonRoutedLinear
from ad_moe.linear import LINEAR_ROLES, routed_linear
from ad_moe.match import LINEAR_SEAMS, SEAMS
from ad_moe.op import ROLES, moe
from ad_moe.shard import EXPERTS, LINEAR_EXPERTS


class Experts(CanonicalOp):
    """The experts behind a router. The router itself, and experts that every token goes through, stay in the graph as they are."""

    name = "moe.experts"
    op = moe
    roles = ROLES
    matchers = SEAMS
    kernels = (TorchExperts(), NativeExperts(), TritonExperts())

    def shard_rules(self) -> Sequence[ShardRule]:
        return (EXPERTS,)


class RoutedLinear(CanonicalOp):
    """One projection with a weight for each expert, for attention whose queries and outputs are experts."""

    name = "moe.linear"
    op = routed_linear
    roles = LINEAR_ROLES
    matchers = LINEAR_SEAMS
    kernels = (TorchRoutedLinear(), NativeRoutedLinear(), TritonRoutedLinear())

    def shard_rules(self) -> Sequence[ShardRule]:
        return (LINEAR_EXPERTS,)
