"""The one door to torch.library: ops are defined once, honestly, and never replaced behind a graph's back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from ad_core.api.errors import OpDefinitionError


@dataclass(frozen=True)
class _Definition:
    schema: str
    source: str
    overload: OpOverload
    reference: Callable[..., Any]


# torch.library is global to the process, so its guard is too.
_DEFINED: dict[str, _Definition] = {}
_LIBRARIES: dict[str, torch.library.Library] = {}


def define_op(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Defines `namespace::name(arguments) -> result` with its implementation for all devices and its fake.

    Mutation is declared in the schema (`Tensor(a!)`). Defining the same schema again from the same source (a module that
    is reloaded) takes the newest functions; any other second definition is an `OpDefinitionError`.
    """
    qualified = schema.split("(", 1)[0].strip()
    namespace, separator, name = qualified.partition("::")
    if not separator or not name.isidentifier() or not namespace.isidentifier():
        raise OpDefinitionError(
            f"an op's schema must start with namespace::name, not {qualified!r}", hint='define_op("ad_toy::mix(Tensor x) -> Tensor", ...)'
        )
    source = _source(reference)
    earlier = _DEFINED.get(qualified)
    if earlier is not None:
        if (earlier.schema, earlier.source) != (schema, source):
            raise OpDefinitionError(
                f"the op {qualified} is defined twice",
                where=f"{earlier.source} and {source}",
                why="a second definition would silently change graphs that already use the first",
                hint="give the new op a name of its own",
            )
        return earlier.overload
    if _exists(namespace, name):
        raise OpDefinitionError(
            f"the op {qualified} exists already", why="it was defined outside of define_op", hint="choose another namespace"
        )
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.define(schema[len(namespace) + 2 :])
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    overload: OpOverload = getattr(getattr(torch.ops, namespace), name).default
    _DEFINED[qualified] = _Definition(schema, source, overload, reference)
    return overload


def find_op(qualified: str) -> OpOverload:
    """The op of a name such as "ad_toy::mix". Raises `OpDefinitionError` if nobody defined it."""
    namespace, _, name = qualified.partition("::")
    if not _exists(namespace, name):
        raise OpDefinitionError(f"there is no op {qualified}", hint="the plugin that defines it must be imported first")
    overload: OpOverload = getattr(getattr(torch.ops, namespace), name).default
    return overload


def implementation(op: Any) -> Callable[..., Any] | None:
    """The function behind an op that `define_op` defined, for who calls it with every argument and needs nothing of the dispatcher."""
    definition = _DEFINED.get(qualified_name(op))
    return definition.reference if definition is not None else None


def qualified_name(op: Any) -> str:
    """ "ad_toy::mix" of an overload; the empty string of anything else."""
    return op._schema.name if isinstance(op, OpOverload) else ""


def _exists(namespace: str, name: str) -> bool:
    return bool(torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}"))


def _source(function: Callable[..., Any]) -> str:
    try:
        return f"{inspect.getsourcefile(function)}:{function.__qualname__}"
    except TypeError:
        return repr(function)
