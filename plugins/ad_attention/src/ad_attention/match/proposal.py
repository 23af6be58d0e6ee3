"""From what a matcher found to what the core writes into the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from ad_attention.match import build
from ad_attention.match.axes import Layout, best, layouts_above, layouts_below
from ad_attention.match.distance_bias import DistanceBias
from ad_attention.match.evaluate import Sizes, Unknown
from ad_attention.match.mask_classifier import MaskKind
from ad_core.api import Declined, Proposal
from ad_core.graph.calls import module_path

OP = "ad_attention::attention"


def declined(node: Node, why: Unknown) -> Declined:
    """The reason, with the place."""
    return Declined(f"{node.name} in {module_path(node) or 'the model'}: {why}")


def propose(
    *,
    nodes: Iterable[Node],
    query: Layout,
    key: Layout,
    value: Layout,
    output: Layout,
    scale: float,
    softcap: float | None,
    mask: MaskKind,
    sinks: Node | None,
    sizes: Sizes,
    bias: DistanceBias | None = None,
) -> Proposal:
    """The proposal for one attention; `sinks` are [H] or [B, H, S, 1]. Raises `Unknown` if an operand cannot be brought to [B, S, H, D]."""
    query_tokens = best(layouts_above(query, sizes, repeats=False))
    key_tokens, value_tokens = _same_heads(list(layouts_above(key, sizes, repeats=True)), list(layouts_above(value, sizes, repeats=True)))
    if query_tokens is None:
        raise Unknown(f"the dimensions of its query {query.node.name} cannot be told apart")
    heads, groups = query_tokens.num_heads, key_tokens.num_heads
    if heads % groups:
        raise Unknown(f"{heads} query heads do not divide into {groups} key heads")
    followed = list(layouts_below(output, sizes))
    end = next((at for at, layout in enumerate(followed) if layout.permutation() == [0, 1, 2, 3] == list(range(len(layout.groups)))), None)
    target = followed[end or 0]
    dtype = value_tokens.node.meta["val"].dtype
    columns = sinks if sinks is not None and sinks.meta["val"].dim() > 1 else None

    def prepare(graph: GraphModule) -> Mapping[str, Any]:
        arguments: dict[str, Any] = {
            name: build.tokens(target.node, layout, dtype)
            for name, layout in (("query", query_tokens), ("key", key_tokens), ("value", value_tokens))
        }
        if mask.slopes is not None:
            arguments["alibi_slopes"] = build.constant(graph, target.node, "alibi_slopes", mask.slopes.expand(heads).clone())
        if bias is not None:
            arguments["distance_bias"] = bias.tokens(target.node, sizes)
        if columns is not None:
            arguments["query_sinks"] = build.columns(target.node, columns)
        return arguments

    def rewrite(graph: GraphModule, result: Node) -> Node:
        return build.from_tokens(result, target)

    ready = end is not None and target.node.meta["val"].dtype == dtype
    vector = sinks if columns is None else None
    constants = {"scale": scale, "window": mask.window, "chunk": mask.chunk, "softcap": softcap, "sinks": vector}
    return Proposal(
        output=target.node,
        nodes=frozenset(nodes) | {layout.node for layout in followed[: (end or 0) + 1]},
        arguments={"query": query_tokens.node, "key": key_tokens.node, "value": value_tokens.node, **constants},
        prepare=prepare,
        rewrite=None if ready else rewrite,
    )


def _same_heads(keys: list[Layout], values: list[Layout]) -> tuple[Layout, Layout]:
    """The best layouts of key and value that have equally many heads, as few as can be."""

    def counts(layouts: list[Layout]) -> set[int]:
        return {layout.num_heads for layout in layouts if layout.permutation() is not None}

    common = counts(keys) & counts(values)
    if not common:
        raise Unknown(f"the heads of its key {keys[0].node.name} and value {values[0].node.name} cannot be told apart, or differ")

    def pick(layouts: list[Layout]) -> Layout:
        found = best(layout for layout in layouts if layout.num_heads == min(common))
        assert found is not None
        return found

    return pick(keys), pick(values)
