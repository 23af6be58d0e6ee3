"""Arguments of a cached op, bound by name. The contract that makes one insertion pass serve every mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload

from ad_core.api.batch import FIELDS
from ad_core.api.errors import OpDefinitionError


def bind_by_name(
    op: OpOverload,
    *,
    call: Mapping[str, Any],
    resources: Mapping[str, Any],
    buffers: Mapping[str, Any],
    append: bool,
    field: Callable[[str], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for `op`.

    A name is looked up in this order: argument of the canonical call, resource, buffer, `append`, batch field, default; an
    optional tensor that nobody gives is None. Anything else is an `OpDefinitionError`: it is the kernel's schema that is wrong.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        name = argument.name
        if name in call:
            value = call[name]
        elif name in resources:
            value = resources[name]
        elif name in buffers:
            value = buffers[name]
        elif name == "append":
            value = append
        elif name in FIELDS:
            value = field(name)
        elif argument.has_default_value():
            value = argument.default_value
        elif isinstance(argument.type, torch.OptionalType):
            value = None
        else:
            raise OpDefinitionError(
                f"nobody gives the argument {name!r} of the cached op {op._schema.name}",
                why="it is no argument of the canonical op, no resource, no buffer of the kernel and no batch field",
                hint=f"batch fields are {', '.join(FIELDS)}",
            )
        if argument.kwarg_only:
            kwargs[name] = value
        else:
            args.append(value)
    return tuple(args), kwargs
