"""Layers that do the same are traced once: the others leave a mark in the trace, and the first one's nodes are copied there.

A rehearsal says which calls of blocks are equal (`ad_core.capture.rehearse`). While the module is exported, the first of them runs with
marks around it, and an equal call only returns marked tensors of the right form. `RepeatPlan.copies` then tells the
flattening of the graph which nodes to copy where. A model of 30 equal layers is traced in the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ad_core.capture.rehearse import BlockCall
from ad_core.graph.ops import define_op


class RepeatError(Exception):
    """The export did not follow the rehearsal. The caller exports again without repeats."""


def _mark_fake(like: torch.Tensor, inputs: Sequence[torch.Tensor], call: int, leaf: int) -> torch.Tensor:
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)


def _mark_run(like: torch.Tensor, inputs: Sequence[torch.Tensor], call: int, leaf: int) -> torch.Tensor:
    raise RepeatError("a mark of capture was left in a graph")


MARK = define_op("ad_core_capture::mark(Tensor like, Tensor[] inputs, int call, int leaf) -> Tensor", _mark_run, _mark_fake)
"""A tensor of the form of `like`. `leaf` counts the block's inputs from 0 and its outputs from -1 downwards."""


@dataclass
class RepeatPlan:
    """Which call stands for which: `models` maps a call's number to the number of the equal call that is traced.

    `varying` holds, for a traced call, the input leaves that differ between it and its copies.
    """

    calls: Sequence[BlockCall]
    models: dict[int, int] = field(default_factory=dict)
    varying: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, calls: Sequence[BlockCall]) -> RepeatPlan:
        """Groups equal calls; the first of a group is traced."""
        plan, firsts = cls(calls), list[BlockCall]()
        for call in calls:
            model = next((first for first in firsts if call.does_the_same_as(first)), None)
            if model is None:
                firsts.append(call)
                continue
            differing = {i for i, (mine, its) in enumerate(zip(call.sources, model.sources, strict=True)) if mine != its}
            if not differing:
                continue  # the same call on the same tensors: nothing marks where a copy would begin
            plan.models[call.number] = model.number
            plan.varying[model.number] = tuple(sorted(differing.union(plan.varying.get(model.number, ()))))
        return plan

    def copied_path(self, number: int) -> tuple[str, str]:
        """Where the traced block lies in the module, and where its copy does."""
        return self.calls[self.models[number]].path, self.calls[number].path


class RepeatTracer:
    """Runs blocks while the module is exported: `run` belongs in `block_calls`."""

    def __init__(self, plan: RepeatPlan):
        self.plan = plan
        self._results: dict[int, list[Any]] = {}

    def run(self, number: int, path: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls `forward` with marks around it, or only leaves marks."""
        plan = self.plan
        if number >= len(plan.calls) or plan.calls[number].path != path:
            raise RepeatError(f"the export called {path} where the rehearsal did not")
        if number in plan.models:
            return self._skip(number, args, kwargs)
        if number not in plan.varying:
            return forward(*args, **kwargs)
        return self._trace(number, forward, args, kwargs)

    def _trace(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        marked: dict[int, torch.Tensor] = {}
        for position in self.plan.varying[number]:
            leaf = leaves[position]
            if id(leaf) not in marked:
                marked[id(leaf)] = MARK(leaf, [], number, position)
            leaves[position] = marked[id(leaf)]
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        results, out_tree = pytree.tree_flatten(forward(*args, **kwargs))
        for position, described in enumerate(self.plan.calls[number].outputs):
            if _made(described):
                results[position] = MARK(results[position], [], number, -1 - position)
        self._results[number] = results
        return pytree.tree_unflatten(results, out_tree)

    def _skip(self, number: int, args: Any, kwargs: Any) -> Any:
        model, call = self.plan.models[number], self.plan.calls[number]
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = [leaves[position] for position in self.plan.varying[model]]
        results: list[Any] = []
        for position, described in enumerate(call.outputs):
            if _made(described):
                results.append(MARK(self._results[model][position], inputs, number, -1 - position))
            elif described in call.inputs:
                results.append(leaves[call.inputs.index(described)])
            else:
                results.append(self._results[model][position])
        return pytree.tree_unflatten(results, call.trees[1])


def _made(described: Any) -> bool:
    """Whether an output leaf is a tensor that the block made."""
    return bool(described[0] == "tensor" and described[1][0] == "made")


@dataclass
class TracedBlock:
    """The part of a trace between the marks of one call: `nodes` in order, `inputs` and `outputs` by leaf."""

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[int, Node] = field(default_factory=dict)
    outputs: dict[int, Node] = field(default_factory=dict)


def _mark_of(node: Node) -> tuple[Node, int, int]:
    like, _, number, leaf = node.args
    assert isinstance(like, Node)
    assert isinstance(number, int)
    assert isinstance(leaf, int)
    return like, number, leaf


def traced_blocks(nodes: Sequence[Node], plan: RepeatPlan) -> dict[int, TracedBlock]:
    """The nodes of every call that has copies. Raises `RepeatError` if marks are missing."""
    blocks: dict[int, TracedBlock] = {}
    inside: int | None = None
    for node in nodes:
        if node.target is not MARK:
            if inside is not None:
                blocks[inside].nodes.append(node)
            continue
        like, number, leaf = _mark_of(node)
        if number in plan.varying and leaf >= 0:
            blocks.setdefault(number, TracedBlock()).inputs[leaf] = node
            inside = number
        elif number in plan.varying:
            if number not in blocks:
                raise RepeatError(f"the traced block {plan.calls[number].path} does not use its inputs")
            blocks[number].outputs[leaf] = like
            inside = None
    missing = plan.varying.keys() - blocks.keys()
    if missing or inside is not None:
        raise RepeatError("marks of traced blocks are missing from the graph")
    return blocks
