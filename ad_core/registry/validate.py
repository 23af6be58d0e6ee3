"""What a hook's items must look like. A wrong one is told apart here, by name, and not deep inside a compilation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from ad_core.api.loading import CompileBackend, Loader
from ad_core.api.matching import Matcher, Seam
from ad_core.api.mixer import CanonicalOp, Kernel, Mixer
from ad_core.api.passes import Pass
from ad_core.api.types import PluginInfo, Role, Stage

_TYPES: Mapping[str, tuple[type, ...]] = {
    "ad_mixers": (Mixer,),
    "ad_ops": (CanonicalOp,),
    "ad_kernels": (Kernel,),
    "ad_matchers": (Matcher, Seam),
    "ad_passes": (Pass,),
    "ad_compilers": (CompileBackend,),
    "ad_loaders": (Loader,),
    "ad_drafters": (object,),
}


def item_problem(hook: str, item: Any, info: PluginInfo) -> str:
    """Why the item cannot be accepted, as the end of a sentence that names it; the empty string if it can."""
    if hook == "ad_commands":
        return _command_problem(item)
    wanted = _TYPES[hook]
    if isinstance(item, type):
        return f"is the class {item.__name__}; return an instance of it"
    if not isinstance(item, wanted):
        return f"is a {type(item).__name__}, not a {' or '.join(kind.__name__ for kind in wanted)}"
    if hook == "ad_ops" and isinstance(item, Mixer):
        return f"({name_of(item)}) is a Mixer; return it from ad_mixers()"
    problem = _name_problem(item) or _own_problem(item, info)
    return f"({name_of(item)}) {problem}" if problem else ""


def name_of(item: Any) -> str:
    """The name that the item gives itself, which is what configuration and the plan call it."""
    info = getattr(item, "info", None)
    return str(getattr(item, "name", None) or getattr(info, "name", None) or type(item).__name__)


def op_name(item: CanonicalOp) -> str:
    """ "ad_toy::mix" of a canonical op. Asks the overload itself, so torch need not be imported here."""
    return str(item.op._schema.name)


def _own_problem(item: Any, info: PluginInfo) -> str:
    if isinstance(item, CanonicalOp):
        return _canonical_problem(item, info)
    if isinstance(item, Kernel):
        return _kernel_problem(item, info)
    if isinstance(item, Matcher | Seam):
        return _matcher_problem(item)
    if isinstance(item, Pass) and not isinstance(getattr(item, "stage", None), Stage):
        return "has no stage; give it one of ad_core.api.Stage"
    return ""


def _canonical_problem(item: CanonicalOp, info: PluginInfo) -> str:
    schema = getattr(getattr(item, "op", None), "_schema", None)
    if schema is None:
        return "has no `op`, or one that was not made by ad_core.graph.define_op"
    name = op_name(item)
    if name.partition("::")[0] not in info.op_namespaces:
        return f"brings the op {name}, outside of the plugin's op_namespaces {info.op_namespaces}"
    arguments, roles = {argument.name for argument in schema.arguments}, getattr(item, "roles", {})
    if set(roles) != arguments or not all(isinstance(role, Role) for role in roles.values()):
        return f"must give a Role to every argument of {name}; at odds: {', '.join(sorted(arguments ^ set(roles))) or 'values are no Role'}"
    for kernel in item.kernels:
        problem = _part_problem(kernel, (Kernel,), info)
        if not problem and kernel.target != name:
            problem = f"has the kernel {name_of(kernel)}, which serves {kernel.target}; foreign ops are served through ad_kernels()"
        if problem:
            return problem
    problems = (_part_problem(matcher, (Matcher, Seam), info) for matcher in item.matchers)
    return next(filter(None, problems), "") or _repeated([*item.kernels]) or _repeated([*item.matchers])


def _part_problem(part: Any, wanted: tuple[type, ...], info: PluginInfo) -> str:
    if not isinstance(part, wanted):
        what = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
        return f"lists {what} where an instance of {' or '.join(kind.__name__ for kind in wanted)} belongs"
    problem = _name_problem(part) or _own_problem(part, info)
    return f"has {name_of(part)}, which {problem}" if problem else ""


def _kernel_problem(kernel: Kernel, info: PluginInfo) -> str:
    for attribute in ("target", "op"):
        value = getattr(kernel, attribute, None)
        if not isinstance(value, str) or "::" not in value:
            return f"has no {attribute} of the form namespace::name"
    if kernel.op.partition("::")[0] not in info.op_namespaces:
        return f"calls the cached op {kernel.op}, outside of the plugin's op_namespaces {info.op_namespaces}"
    if kernel.graph not in ("full", "decode", "never"):
        return f"says graph={kernel.graph!r}; known are full, decode, never"
    if isinstance(kernel.requires, str):
        return "must list its requirements as a tuple of strings"
    for text in kernel.requires:
        try:
            Requirement(text)
        except InvalidRequirement:
            return f"requires {text!r}, which is not a PEP 508 requirement"
    return ""


def _matcher_problem(matcher: Matcher | Seam) -> str:
    produces = getattr(matcher, "produces", None)
    return "" if isinstance(produces, str) and "::" in produces else "does not say which canonical op it produces (namespace::name)"


def _command_problem(item: Any) -> str:
    import typer

    if not isinstance(item, typer.Typer):
        return f"is a {type(item).__name__}, not a typer.Typer"
    return "" if isinstance(item.info.name, str) and item.info.name else "has no name; use typer.Typer(name=...)"


def _name_problem(item: Any) -> str:
    if type(item).__module__ == "builtins":
        return ""
    name = getattr(item, "name", None)
    return "" if isinstance(name, str) and name.strip() else "has no name"


def _repeated(items: Iterable[Any]) -> str:
    seen: set[str] = set()
    for item in items:
        if name_of(item) in seen:
            return f"has two different parts named {name_of(item)!r}"
        seen.add(name_of(item))
    return ""
