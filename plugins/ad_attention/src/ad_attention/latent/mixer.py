"""Latent attention as the core knows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_attention.latent.op import ROLES, mla
from ad_attention.latent.torch_kernel import TorchLatent
from ad_attention.latent.triton_kernel import TritonLatent
from ad_core.api import Mixer, OpCall, PagedTokens, Resource, ShardRule

HEADS = ShardRule(
    op="ad_attention::mla",
    axis="tensor",
    splits={"q_nope": 2, "q_rope": 2, "up_weight": 0, "sinks": 0},
    output=2,
    divides="num_heads",
)
"""By heads: each rank keeps the whole latent, which all heads share."""


class LatentAttention(Mixer):
    """MLA: a row of R + P numbers a token, whatever the number of heads. The pass `attention.mla` finds it."""

    name = "attention.mla"
    op = mla
    roles = ROLES
    kernels = (TorchLatent(), TritonLatent())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        width = int(call["latent"].shape[2]) + int(call["k_rope"].shape[2])
        return {"latent_pages": PagedTokens((width,), call["latent"].dtype, call["window"])}

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        return ("latent", "k_rope", "window")

    def shard_rules(self) -> Sequence[ShardRule]:
        return (HEADS,)
