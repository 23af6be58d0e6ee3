"""One module, one export: the flat graph of its forward, with dynamic batch and length."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from ad_core.capture.fakes import fake_weights
from ad_core.capture.flatten import Origin, flatten
from ad_core.capture.forward import ForwardForm, LogitsOnly, forward_form
from ad_core.capture.furthest import Horizon
from ad_core.capture.regions import inline_regions
from ad_core.capture.rehearse import Rehearsal, block_calls
from ad_core.capture.repeats import RepeatError, RepeatPlan, RepeatTracer
from ad_core.capture.scope import inference_form, untouched

_SHAPE = (2, 12)
"""What is traced: a batch and a length that differ from each other, from 1 and from most sizes of a model."""


@dataclass
class Entries:
    """How often seams put an op in while the whole module ran once, and how often each op outside of ATen ran (None: only in part)."""

    counts: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] | None = None

    def __call__(self, op: str) -> None:
        if self.executed is None:  # after the rehearsal, layers that are copied would not be counted
            self.counts[op] += 1


@dataclass(frozen=True)
class Exported:
    """The graph of a forward, and how it was traced: how many blocks there are and how many of them were copied."""

    graph: GraphModule
    blocks: int
    copied: int
    note: str = ""


def export_module(
    module: nn.Module,
    *,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    give_positions: bool = True,
    repeats: bool = True,
    entries: Entries | None = None,
) -> Exported:
    """Exports the forward of `module` with its inputs `input_ids` [B, S] and, if it takes them and `give_positions`, `position_ids` [B, S].

    The module may be on meta; its own tensors are not touched and it is left as it was. `device` is where the graph will run:
    its constants say so. Layers that do the same are traced once unless `repeats` is False. `entries` counts what seams put in.
    Raises what the module or torch.export raise, and `ConfigError` if the module computes something else for sequences that are shorter
    than `max_length`.
    """
    form = forward_form(module)
    device = torch.device(device)
    entries = entries if entries is not None else Entries()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    origin = Origin.of(module, "module.")
    with inference_form(module), fake_weights(module, mode, device), torch.no_grad():
        with mode:
            ids = torch.zeros(_SHAPE, dtype=torch.int64, device=device)
            names = ["input_ids", "position_ids"] if give_positions and form.positions else ["input_ids"]
            inputs = (ids, torch.zeros_like(ids))[: len(names)]
        plan, note = RepeatPlan([]), ""
        if repeats:
            plan, note = _rehearsed(module, form, mode, inputs, Horizon(max_length), entries)
        horizon = Horizon(max_length)
        try:
            graph = _export(module, form, inputs, names, horizon, plan, origin)
        except RepeatError as error:
            note, plan = f"layers were traced one by one: {error}", RepeatPlan([])
            graph = _export(module, form, inputs, names, horizon, plan, origin)
        horizon.check(graph, lambda longest: _export(module, form, inputs, names, longest, plan, origin))
    return Exported(graph, len(plan.calls), len(plan.models), note)


def _rehearsed(
    module: nn.Module,
    form: ForwardForm,
    mode: FakeTensorMode,
    inputs: tuple[torch.Tensor, ...],
    horizon: Horizon,
    entries: Entries,
) -> tuple[RepeatPlan, str]:
    """Which layers may be copied. A module that cannot run on fake tensors of fixed shape is traced layer by layer."""
    rehearsal = Rehearsal(module)
    before = entries.counts.copy()
    answers = horizon.watching(inputs[1] if len(inputs) > 1 else None)
    try:
        with untouched(module), mode, rehearsal, _as_in_export(), block_calls(module, rehearsal.run_block), answers:
            LogitsOnly(module, form)(*inputs)
    except Exception as error:  # whatever the author's code raises: the export will say it better, or do without
        entries.counts = before
        said = str(error).strip().splitlines()
        return RepeatPlan([]), f"layers were traced one by one: the rehearsal raised {type(error).__name__}: {said[0] if said else ''}"
    entries.executed = rehearsal.executed
    return RepeatPlan.of(rehearsal.calls), ""


def _export(
    module: nn.Module,
    form: ForwardForm,
    inputs: tuple[torch.Tensor, ...],
    names: list[str],
    horizon: Horizon,
    plan: RepeatPlan,
    origin: Origin,
) -> GraphModule:
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    length = torch.export.Dim("length", min=1, max=max(horizon.longest or 1 << 20, _SHAPE[1] + 1))
    calls = block_calls(module, RepeatTracer(plan).run) if plan.models else nullcontext()
    with untouched(module), calls, warnings.catch_warnings():
        # what the forward leaves in attributes is put back
        warnings.filterwarnings("ignore", message="The tensor attribute", category=UserWarning)
        try:
            program = torch.export.export(
                _Traced(module, form, horizon),
                inputs,
                dynamic_shapes=({0: batch, 1: length},) * len(inputs),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
        except _RaisedError as raised:
            raise raised.error from None
    inline_regions(program.graph_module)
    return flatten(program, origin, names, plan)


class _Traced(LogitsOnly):
    """What is exported."""

    def __init__(self, module: nn.Module, form: ForwardForm, horizon: Horizon):
        super().__init__(module, form)
        self._horizon = horizon

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        try:
            with _WithoutGradRegions(), self._horizon.watching(position_ids):
                return super().forward(input_ids, position_ids)
        except Exception as error:
            raise _RaisedError(error) from error


class _RaisedError(Exception):
    """Carries what a forward raised past torch.export, which prints the whole graph so far for some of it."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class _WithoutGradRegions(TorchFunctionMode):
    """Capture runs without gradients, so a `no_grad` inside the forward changes nothing; export would cut the graph into regions there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


@contextmanager
def _as_in_export() -> Iterator[None]:
    """Code that asks whether it is being exported gets the same answer as in the export."""
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    try:
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before
