"""The numeric guard: a pass may not change what the graph computes by more than its declared safety allows.

The graph runs on a small made-up input before and after the pass. Weights that are not loaded yet are made up too: they depend on
their path only, so both runs see the same. While any are made up, everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from ad_core.api.errors import NumericGuardError
from ad_core.api.types import Safety
from ad_core.graph.edit import is_op, tensor_at, tensors_read
from ad_core.graph.float32 import HALF, InFloat32
from ad_core.graph.probe import random_tensor

SHAPE = (2, 9)
"""Batch and length of the sample."""

_TOLERANCE: Mapping[Safety, tuple[float, float]] = {"exact": (1e-5, 1e-2), "reordered": (1e-4, 3e-2), "lossy": (0.25, 0.25)}
"""By safety, in float32 and in half precision: the largest difference over the largest value; for lossy passes the root mean square of
the difference over that of the values."""


@dataclass(frozen=True)
class Inert:
    """Why nothing can be compared."""

    reason: str


@dataclass(frozen=True)
class Sample:
    """What a graph computed, and from which weights: `made_up` maps the paths of those without values to their shapes, `real` are the
    others."""

    outputs: tuple[torch.Tensor, ...]
    made_up: Mapping[str, torch.Size]
    real: frozenset[str]
    half: bool


class NumericGuard:
    """Compares runs of one model's graphs whose weights take at most `size_limit` bytes; for larger ones it says that it is inert."""

    def __init__(self, size_limit: int):
        self._size_limit = size_limit
        self._vocabulary = 0  # of the first graph: a pass may hide what looks ids up

    def sample(self, graph: GraphModule) -> Sample | Inert:
        """Runs the graph on the made-up input. Raises what its ops raise."""
        weights = {path: tensor for path in tensors_read(graph) if (tensor := tensor_at(graph, path)) is not None}
        made_up = {path: tensor.shape for path, tensor in weights.items() if tensor.is_meta}
        size = sum(
            tensor.numel() * (4 if path in made_up else tensor.dtype.itemsize) for path, tensor in weights.items() if _strided(tensor)
        )
        if size > self._size_limit:
            return Inert(f"the weights take {size / 2**20:.0f} MiB, above the limit of {self._size_limit / 2**20:.0f} MiB")
        devices = {tensor.device for tensor in weights.values()}
        device = torch.device("cpu") if made_up or not devices else devices.pop()
        self._vocabulary = self._vocabulary or _vocabulary(graph)
        inputs = _inputs(graph, device, self._vocabulary)
        if isinstance(inputs, Inert):
            return inputs
        with torch.no_grad():
            outputs = (_MadeUp if made_up else _Runner)(graph).run(*inputs, enable_io_processing=False)
        half = not made_up and any(tensor.dtype in HALF for tensor in weights.values())
        return Sample(tuple(value.float() for value in _tensors(outputs)), made_up, frozenset(weights.keys() - made_up.keys()), half)

    def compare(
        self, before: Sample | Inert, graph: GraphModule, *, name: str, distribution: str, safety: Safety
    ) -> tuple[Sample | Inert, str]:
        """Runs the graph as the pass left it. The sample, for the next pass, and one line for the plan.

        Raises `NumericGuardError` if the graph no longer runs, or computes something else.
        """
        try:
            after = self.sample(graph)
        except Exception as error:  # whatever an op raises: it ran before the pass
            if isinstance(before, Inert):
                return Inert(f"the graph cannot be run here: {type(error).__name__}"), f"inert: {before.reason}"
            raise NumericGuardError(
                f"the graph no longer runs after the pass {name}",
                where=f"pass {name} of {distribution}",
                why=f"{type(error).__name__}: {error}",
            ) from error
        for side in (before, after):
            if isinstance(side, Inert):
                return after, f"inert: {side.reason}"
        assert isinstance(before, Sample)
        assert isinstance(after, Sample)
        loaded = before.made_up.keys() & after.real
        if loaded:
            return after, f"inert: {len(loaded)} weights got their values from the pass"
        changed = [path for path, shape in after.made_up.items() if before.made_up.get(path) != shape]
        if changed:
            return after, f"inert: {len(changed)} weights ({changed[0]} ...) are new and have no values yet"
        difference = _difference(before.outputs, after.outputs, safety)
        allowed = _TOLERANCE[safety][before.half or after.half]
        if not difference <= allowed:
            raise NumericGuardError(
                f"the pass {name} changed the model's numbers",
                where=f"pass {name} of {distribution}",
                why=f"the logits differ by {difference:.2g} of their size; a pass that is {safety!r} may differ by {allowed:.2g}",
                hint=f"deny the plugin of {name}, and report it",
            )
        return after, f"differs by {difference:.1e}, allowed {allowed:.0e} ({safety})"

    def first(self, graph: GraphModule) -> Sample | Inert:
        """The sample before the first pass: a graph that does not run makes the guard inert."""
        try:
            return self.sample(graph)
        except Exception as error:  # any op may refuse; there is nothing to hold a pass against
            return Inert(f"the graph cannot be run here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


class _Runner(Interpreter):
    """Runs a graph node by node."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return None  # the guards of export; no other module is in a graph


class _MadeUp(_Runner, InFloat32):
    """The same on the CPU and in float32, with numbers for the weights that have none."""

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return _random(target, value) if isinstance(value, torch.Tensor) and value.is_meta else value

    def constant(self, value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else super().constant(value)


def _random(path: str, like: torch.Tensor) -> torch.Tensor:
    """Numbers that keep activations near one: vectors (norms, biases) around one, matrices scaled by their width."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    values = random_tensor(like.shape, torch.float32, path)
    return 1 + values.clamp(-2, 2).div(4) if like.dim() < 2 else values.div(float(like.shape[-1]) ** 0.5)


def _inputs(graph: GraphModule, device: torch.device, vocabulary: int) -> list[torch.Tensor] | Inert:
    made = []
    generator = torch.Generator().manual_seed(0)
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if node.target not in ("input_ids", "position_ids", "inputs_embeds") or not isinstance(value, torch.Tensor):
            return Inert(f"the input {node.target} belongs to the engine's packed batch and cannot be made up here")
        shape = [size if isinstance(size, int) else default for size, default in zip(value.shape, (*SHAPE, None), strict=False)]
        if node.target == "input_ids":
            made.append(torch.randint(0, vocabulary, shape, generator=generator))
        elif node.target == "position_ids":
            made.append(torch.arange(shape[1]).expand(*shape))
        else:
            made.append(torch.randn(*shape, generator=generator))
    return [tensor.to(device) for tensor in made]


def _vocabulary(graph: GraphModule) -> int:
    """How many ids every embedding of the graph can look up, positions left out: those tables are indexed by other inputs."""
    rows = [16]
    for node in graph.graph.nodes:
        if is_op(node, "aten::embedding"):
            index = node.args[1]
            while isinstance(index, Node) and index.op == "call_function":
                index = next((parent for parent in index.all_input_nodes if isinstance(parent.meta.get("val"), torch.Tensor)), None)
            if isinstance(index, Node) and index.target == "input_ids":
                rows.append(int(node.args[0].meta["val"].shape[0]))
    return min(rows[1:] or rows)


def _difference(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...], safety: Safety) -> float:
    if [value.shape for value in before] != [value.shape for value in after]:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        both = torch.isfinite(old) & torch.isfinite(new)
        if not torch.equal(old[~both].nan_to_num(1.0), new[~both].nan_to_num(1.0)):
            return float("inf")
        old, new = old[both].double(), new[both].double()
        if not old.numel():
            continue
        if safety == "lossy":
            worst = max(worst, float(((new - old).square().mean() / old.square().mean().clamp_min(1e-30)).sqrt()))
        else:
            worst = max(worst, float((new - old).abs().max() / old.abs().max().clamp_min(1e-30)))
    return worst


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, torch.Tensor):
            yield item


def _strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided
