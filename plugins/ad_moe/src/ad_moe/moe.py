"""Routed experts as the core knows them: an op that keeps no memory, how it is found, what runs it, how it divides."""

from __future__ import annotations

from collections.abc import Sequence

from ad_core.api import CanonicalOp, ShardRule
from ad_moe.kernels.torch_ref import TorchExperts
from ad_moe.match import SEAMS
from ad_moe.op import ROLES, moe
from ad_moe.shard import EXPERTS


class Experts(CanonicalOp):
    """The experts behind a router. The router itself, and experts that every token goes through, stay in the graph as they are."""

    name = "moe.experts"
    op = moe
    roles = ROLES
    matchers = SEAMS
    kernels = (TorchExperts(),)

    def shard_rules(self) -> Sequence[ShardRule]:
        return (EXPERTS,)
