"""The capture verifier: is this graph the module? First by its structure, then, when the weights fit, by its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api.errors import CaptureError, CheckpointError
from ad_core.capture.forward import LogitsOnly
from ad_core.capture.scope import inference_form, tensors_kept
from ad_core.graph.float32 import HALF, InFloat32
from ad_core.graph.ops import qualified_name
from ad_core.graph.tokens import MixingNode, find_mixing

SIZE_LIMIT = 2 << 30
"""Bytes of weights up to which numbers are compared unless the user says otherwise."""

SHAPES = ((1, 1), (2, 9), (1, 33))
"""Batch and length of the three comparisons."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference, for float32 and float64 of the largest single logit, below that of the root mean square, over the spread of the
reference's logits. A wrong mask, position or scale shows as a tenth or more."""


def verify_structure(
    graph: GraphModule, ops: Collection[str], entered: Mapping[str, int], executed: Mapping[str, int] | None
) -> list[MixingNode]:
    """The places where tokens mix outside of the canonical `ops`: there must be none. Raises `CaptureError` if an op that the module
    ran is not in the graph.

    `entered` counts what seams put in, `executed` every canonical op of one whole run of the module (None: there was none).
    """
    found = Counter(name for node in graph.graph.nodes if (name := qualified_name(node.target)) in ops)
    for op in sorted({*entered, *(executed or {})}):
        if op not in ops:
            continue
        wanted = max(entered.get(op, 0), (executed or {}).get(op, 0))
        if found[op] < wanted:
            raise CaptureError(
                f"{wanted} calls of {op} were made in the module and {found[op]} are in its graph",
                why="the result of some was not used, or the layers do not all run when the module is exported",
                hint="the model has a path that its forward does not take in inference; run it eagerly to see which",
            )
    return find_mixing(graph, ops)


class NumbersError(CaptureError):
    """The graph's logits are not the module's."""


@dataclass
class Reference:
    """The logits of the unpatched module at every shape, computed once, with ids alone: its positions are its own."""

    module: nn.Module
    max_length: int | None = None
    special_ids: frozenset[int] = frozenset()
    _logits: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _wide: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return _device_of(self.module)

    def logits(self, vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids [B, S], logits [B, S, V]) of every shape, on the CPU, logits in float32."""
        if not self._logits:
            lengths = [(batch, min(length, self.max_length or length)) for batch, length in SHAPES]
            ids = [text_ids(batch, length, vocabulary, self.special_ids) for batch, length in lengths]
            self._logits = list(zip(ids, _run(self.module, ids), strict=True))
        return self._logits

    def in_float32(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits of the module if it computed in float32: a copy of it does. Raises what copying a module raises."""
        if self._wide is None:
            self._wide = deepcopy(self.module).float()
        (logits,) = _run(self._wide, [ids])
        return logits

    def counts_from_zero(self, vocabulary: int) -> bool:
        """Whether the module gives the same logits when it is told that positions are 0, 1, 2 ..."""
        ids, wanted = self.logits(vocabulary)[1]
        plain = LogitsOnly(self.module)
        if not plain.form.positions:
            return True
        with inference_form(self.module), torch.no_grad():
            told = plain(ids.to(self.device), torch.arange(ids.shape[1], device=self.device).expand_as(ids)).float().cpu()
        return distance(told, wanted, torch.float32) <= _TOLERANCE[torch.bfloat16]


def _run(module: nn.Module, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    plain, device = LogitsOnly(module), _device_of(module)
    with inference_form(module), tensors_kept(module), torch.no_grad():
        return [plain(ids.to(device)).float().cpu() for ids in batches]


def _device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), torch.device("cpu"))


@dataclass(frozen=True)
class Agreement:
    """How far the graph is from the module: the worst relative difference over all shapes, and how much was allowed. `widened`: at so
    many shapes rounding to half precision hid it, and both were compared in float32."""

    worst: float
    allowed: float
    widened: int = 0

    def __str__(self) -> str:
        note = f"; at {self.widened} of them in float32, for rounding is larger in this model" if self.widened else ""
        return f"logits equal at {len(SHAPES)} shapes (worst relative difference {self.worst:.1e}, allowed {self.allowed:.0e}{note})"


def verify_numbers(graph: GraphModule, reference: Reference, dtype: torch.dtype, device: torch.device) -> Agreement:
    """Compares the graph, called with positions 0, 1, 2 ..., with the reference. Where half precision differs by more than is allowed,
    as where experts are chosen otherwise or rounding builds up, both are compared in float32. Raises `NumbersError` where they differ,
    `CheckpointError` where the module itself computes NaN."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    allowed = _TOLERANCE.get(dtype, 4e-2)
    worst, widened = 0.0, 0
    for ids, wanted in reference.logits(vocabulary_of(graph)):
        if wanted.isnan().any():
            raise CheckpointError(
                "the module's own logits are not numbers",
                why=f"at batch {ids.shape[0]}, length {ids.shape[1]} {int(wanted.isnan().sum())} of {wanted.numel()} are NaN",
                hint="the weights are damaged or were never loaded, or overflow in this dtype: try dtype='float32'",
            )
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        values = {"input_ids": ids.to(device), "position_ids": positions}
        given = [values[name] for name in names]
        with torch.no_grad():
            logits = graph(*given).float().cpu()
        difference = distance(logits, wanted, dtype)
        if not difference <= allowed:  # not a number counts as different
            if dtype in HALF and _same_in_float32(graph, given, reference, ids):
                widened += 1
                continue
            raise NumbersError(
                f"the graph's logits differ from the module's at batch {ids.shape[0]}, length {ids.shape[1]}",
                why=f"the relative difference is {difference:.2g}, and {allowed:.0e} is allowed in {str(dtype).removeprefix('torch.')}",
                hint="the capture missed something that the model computes",
            )
        worst = max(worst, difference)
    return Agreement(worst, allowed, widened)


def _same_in_float32(graph: GraphModule, given: Sequence[torch.Tensor], reference: Reference, ids: torch.Tensor) -> bool:
    try:
        wanted = reference.in_float32(ids)
        with torch.no_grad():
            logits = InFloat32(graph).run(*given).float().cpu()
    except Exception:  # any code of the author's: what does not compute in float32 stays different
        return False
    return distance(logits, wanted, torch.float32) <= _TOLERANCE[torch.float32]


def distance(logits: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """How far `logits` are from those that are wanted: relative to the largest, in half precision to their spread."""
    if logits.shape != wanted.shape:
        return float("inf")
    error, spread = logits - wanted, wanted.std(correction=0).clamp_min(1e-6)
    if dtype in (torch.float32, torch.float64):
        return float(error.abs().max() / wanted.abs().max().clamp_min(1e-6))
    return float(error.square().mean().sqrt() / spread)


def text_ids(batch: int, length: int, vocabulary: int, special: frozenset[int]) -> torch.Tensor:
    """Ids that look like text to the model: none of its special ones, the same at every call."""
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(17 * batch + length))
    allowed = next((number for number in range(vocabulary) if number not in special), 0)
    for number in special:
        ids[ids == number] = allowed
    return ids


def vocabulary_of(graph: GraphModule) -> int:
    """Ids below this are sure to be in the embedding: the first table that is looked up by the ids, else the width of the logits."""
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.target == "input_ids":
            for user in node.users:
                if qualified_name(user.target) == "aten::embedding":
                    return int(user.args[0].meta["val"].shape[0])
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    return int(output.args[0].meta["val"].shape[-1])
