"""Canonical calls outside of a graph: with real tensors, and as the `OpCall` with symbolic sizes that a plugin decides upon."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ad_core.api import CanonicalOp, OpCall, Role
from ad_core.graph.ops import qualified_name
from ad_core.testing.cases import Case, map_tensors


def invoke(op: OpOverload, arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Calls `op` with arguments by name, each in the place that the schema gives it. Results are always a tuple."""
    args, kwargs = [], {}
    for argument in op._schema.arguments:
        if argument.name in arguments:
            value = arguments[argument.name]
        elif argument.has_default_value():
            value = argument.default_value
        else:
            value = None
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    result = op(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def symbolic_arguments(roles: Mapping[str, Role], arguments: Mapping[str, Any], leading: int = 2) -> dict[str, Any]:
    """`arguments` as fake tensors; of TOKEN arguments the first `leading` dimensions are symbols (1: packed, only the second)."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)
    dynamic = {0, 1} if leading == 2 else {1}

    def fake(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        axes = dynamic if roles.get(name) == Role.TOKEN else set()
        sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(sizes), source=None)

    return {name: fake(name, value) for name, value in arguments.items()}


@functools.lru_cache(maxsize=256)  # making symbols takes longer than running most steps
def symbolic_call(mixer: CanonicalOp, case: Case, dtype: torch.dtype, device: str) -> OpCall:
    """The call as a captured graph would have it: every argument of the schema, fake, batch and length symbolic."""
    fakes = symbolic_arguments(mixer.roles, on_device(case.arguments(3, 7, dtype), torch.device(device)))
    schema = mixer.op._schema.arguments
    defaults = {argument.name: argument.default_value if argument.has_default_value() else None for argument in schema}
    return OpCall("conformance", "conformance.mixer", qualified_name(mixer.op), {**defaults, **fakes})


def on_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`arguments` with its tensors moved."""
    return map_tensors(lambda tensor: tensor.to(device), arguments)
