"""Tiny models, hand-written attentions, and a driver of our own: export, match, rewrite, compare with the module itself.

`models.json` holds a configuration for every causal language model of transformers whose only mixer is softmax attention. The driver is not
the core's capture, so that these tests tell which of the two is wrong.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Node

import ad_attention.op  # noqa: F401  (defines the canonical op)
from ad_attention.match import MATCHERS
from ad_core.api import Declined
from ad_core.graph.edit import flat_module, is_op, remove_dead_code
from ad_core.graph.ops import find_op

OP = "ad_attention::attention"
SHAPES = ((1, 1), (2, 9), (3, 21), (1, 33))
MODELS = json.loads(Path(__file__).with_name("models.json").read_text())


def build(name: str, attn_implementation: str | None = None) -> nn.Module:
    """A model of models.json in float32 and eval mode, the same weights on every call.

    Weights spread by 0.125, and nothing stays at a constant initial value: unit norms and zero biases would hide mistakes.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    entry = MODELS[name]
    torch.manual_seed(entry["seed"])
    config = CONFIG_MAPPING[entry["model_type"]](**copy.deepcopy(entry["config"]))
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    noise = torch.Generator().manual_seed(entry["seed"] + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter.add_(entry["perturb"] * torch.randn(parameter.shape, generator=noise))
    return model.requires_grad_(False)


def prompt(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, positions), both [B, S]; ids avoid those that models treat specially."""
    ids = torch.randint(4, 96, (batch, length), generator=torch.Generator().manual_seed(100))
    return ids, torch.arange(length).expand(batch, length).contiguous()


class Forward(nn.Module):
    """(input_ids, position_ids) -> logits, of a transformers model or of a `Toy`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters.values()
        self.takes = {parameter.name for parameter in parameters}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            self.takes.add("use_cache")

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        options = {"position_ids": position_ids, "use_cache": False}
        result = self.model(input_ids=input_ids, **{name: value for name, value in options.items() if name in self.takes})
        return result if isinstance(result, torch.Tensor) else result.logits


def export(model: nn.Module) -> GraphModule:
    """A flat graph with dynamic batch and length, without asserts."""
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=100)}
    with torch.no_grad():
        program = torch.export.export(
            Forward(model), prompt(2, 12), dynamic_shapes=(dims, dims), strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )
    graph = flat_module(program.module())
    for node in list(graph.graph.nodes):
        if "assert" in str(node.target):
            graph.graph.erase_node(node)
    (result,) = graph.graph.output_node().args[0]
    graph.graph.output_node().args = (result,)
    remove_dead_code(graph)
    graph.recompile()
    return graph


@dataclass
class Matched:
    """A graph after its proposals were written into it, and what the matchers declined."""

    graph: GraphModule
    declined: list[str] = field(default_factory=list)

    @property
    def calls(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if is_op(node, OP)]

    def constants(self, name: str) -> list[Any]:
        return [call.kwargs.get(name) for call in self.calls]


def match(graph: GraphModule) -> Matched:
    """Writes every proposal of the plugin's matchers into the graph, the last first: the core promises no order."""
    matched = Matched(graph)
    for matcher in MATCHERS:
        for offer in reversed(list(matcher.find(graph))):
            if isinstance(offer, Declined):
                matched.declined.append(offer.reason)
                continue
            with graph.graph.inserting_before(offer.output):
                arguments: dict[str, Any] = {**offer.arguments, **(offer.prepare(graph) if offer.prepare else {})}
                assert not {value for value in arguments.values() if isinstance(value, Node)} & offer.nodes
                operands = [arguments.pop(name) for name in ("query", "key", "value")]
                call = graph.graph.call_function(
                    find_op(OP), tuple(operands), {name: value for name, value in arguments.items() if value is not None}
                )
                values, options = torch.fx.node.map_arg((call.args, call.kwargs), lambda node: node.meta["val"])
                with values[0].fake_mode:
                    call.meta["val"] = call.target(*values, **options)
                result = offer.rewrite(graph, call) if offer.rewrite else call
            assert result.meta["val"].shape == offer.output.meta["val"].shape
            assert result.meta["val"].dtype == offer.output.meta["val"].dtype
            offer.output.replace_all_uses_with(result)
            for node in sorted(offer.nodes, reverse=True):
                graph.graph.erase_node(node)
    remove_dead_code(graph)
    graph.graph.lint()
    graph.recompile()
    return matched


def square_nodes(graph: GraphModule) -> list[str]:
    """Nodes with two dimensions of the sequence's length, and softmaxes over the sequence."""
    (ids,) = [node for node in graph.graph.nodes if node.op == "placeholder" and node.target == "input_ids"]
    length = ids.meta["val"].shape[1]
    found = []
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and sum(isinstance(size, torch.SymInt) and str(size) == str(length) for size in value.shape) > 1:
            found.append(f"{node.name} {tuple(value.shape)}")
    return found


@torch.no_grad()
def worst_difference(graph: Callable[..., torch.Tensor], wanted: Mapping[tuple[int, int], torch.Tensor]) -> float:
    return max(float((graph(*prompt(*shape)) - logits).abs().max()) for shape, logits in wanted.items())


@torch.no_grad()
def logits(model: nn.Module) -> dict[tuple[int, int], torch.Tensor]:
    forward = Forward(model)
    return {shape: forward(*prompt(*shape)) for shape in SHAPES}


class Toy(nn.Module):
    """A language model of one layer around a hand-written attention.

    `attend(self, q, k, v, input_ids, position_ids)` gets q [B, H, S, D], k and v [B, G, S, D] and returns [B, H, S, D].
    """

    H, G, D, V = 4, 2, 8, 96

    def __init__(
        self, attend: Callable[..., torch.Tensor], heads: tuple[int, int] = (4, 2), buffers: Mapping[str, torch.Tensor] | None = None
    ):
        super().__init__()
        self.H, self.G = heads
        width = self.H * self.D
        torch.manual_seed(0)
        self.embed = nn.Embedding(self.V, width)
        self.q, self.k, self.v = (nn.Linear(width, n * self.D) for n in (self.H, self.G, self.G))
        self.out = nn.Linear(width, self.V)
        self.sinks = nn.Parameter(torch.randn(self.H))
        self.bias = nn.Parameter(torch.randn(self.H, 128, 128))
        for name, value in (buffers or {}).items():
            self.register_buffer(name, value, persistent=False)
        self.attend = attend
        self.requires_grad_(False).eval()

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        shape = (*input_ids.shape, -1, self.D)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = self.attend(self, q, k, v, input_ids, position_ids)
        return self.out(x + y.transpose(1, 2).reshape(x.shape))


@pytest.fixture(scope="session")
def driver() -> SimpleNamespace:
    """Everything above: test modules cannot import a conftest."""
    return SimpleNamespace(
        OP=OP,
        MODELS=MODELS,
        Toy=Toy,
        build=build,
        prompt=prompt,
        export=export,
        match=match,
        logits=logits,
        worst_difference=worst_difference,
        square_nodes=square_nodes,
    )
