"""Sparse attention as the core knows it: two mixers, so that layers may share one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ad_attention.sparse.match import IndexerMatcher
from ad_attention.sparse.op import SELECT_ROLES, SELECTED_ROLES, select, selected
from ad_attention.sparse.torch_select import TorchSelect
from ad_attention.sparse.torch_selected import TorchSelected
from ad_attention.sparse.triton_select import TritonSelect
from ad_attention.sparse.triton_selected import TritonSelected
from ad_core.api import Mixer, OpCall, PagedTokens, Resource, ShardRule

HEADS = ShardRule(
    op="ad_attention::selected",
    axis="tensor",
    splits={"query": 2, "key": 2, "value": 2, "sinks": 0, "key_pages": 0, "value_pages": 0},
    output=2,
    divides="num_kv_heads",
)
"""By heads: the choice is the same for all. The indexer itself is small and runs whole on every rank."""


class Select(Mixer):
    """Which positions a token attends to, by the scores of a small indexer."""

    name = "attention.select"
    op = select
    roles = SELECT_ROLES
    matchers = (IndexerMatcher(),)
    kernels = (TorchSelect(), TritonSelect())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        return {"index_pages": PagedTokens((int(call["key"].shape[2]),), call["key"].dtype, every=call["every"])}

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        return ("key", "every")


class Selected(Mixer):
    """Softmax attention over the positions that each token chose."""

    name = "attention.selected"
    op = selected
    roles = SELECTED_ROLES
    kernels = (TorchSelected(), TritonSelected())

    def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
        sources = {"key_pages": call["key"], "value_pages": call["value"]}
        return {name: PagedTokens(tuple(int(size) for size in source.shape[2:]), source.dtype) for name, source in sources.items()}

    def sharing_key(self, call: OpCall) -> tuple[str, ...]:
        return ("key", "value")

    def shard_rules(self) -> Sequence[ShardRule]:
        return (HEADS,)
