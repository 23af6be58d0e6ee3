"""Asking one plugin at a time: pluggy's rules for what a hook is, our rules for what it may return."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import pluggy

from ad_core.api import hooks as specs
from ad_core.api.errors import nearest
from ad_core.api.types import PluginInfo
from ad_core.registry.validate import item_problem

HOOKS: tuple[str, ...] = tuple(name for name, value in vars(specs).items() if hasattr(value, f"{specs.PROJECT}_spec"))
"""Every hook of the contract."""

_MARK = f"{specs.PROJECT}_impl"


class HookError(Exception):
    """A plugin breaks the contract in one of its hooks; the message is the reason shown to the user."""


def implemented(module: Any) -> tuple[str, ...]:
    """The hooks that a plugin implements. Raises `HookError` for one that does not exist, or that pluggy refuses."""
    names = []
    for attribute, hook, marked in _candidates(module):
        if hook not in HOOKS:
            close = nearest(hook, HOOKS)
            help = f"did you mean {close!r}?" if close else f"known are {', '.join(HOOKS)}"
            raise HookError(f"it has an unknown hook {hook!r}; {help}")
        if not marked:
            raise HookError(f"its function {attribute!r} is not marked with @hookimpl, so it would never be called")
        names.append(hook)
    _manager(module)
    return tuple(name for name in HOOKS if name in names)


def call(module: Any, info: PluginInfo, hook: str) -> tuple[Any, ...]:
    """What the plugin's hook returns, checked item by item. Raises `HookError`, or whatever the plugin raises."""
    caller = getattr(_manager(module).hook, hook)
    if not caller.get_hookimpls():
        return ()
    results = caller()
    result = results[0] if results else None  # pluggy leaves out a None
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        raise HookError(f"{hook}() returned {_kind(result)}, not a list")
    for position, item in enumerate(result):
        problem = item_problem(hook, item, info)
        if problem:
            raise HookError(f"item {position} of {hook}() {problem}")
    return tuple(result)


def _manager(module: Any) -> pluggy.PluginManager:
    """A manager that knows this plugin alone: no other plugin can be hurt by it, or change the order of anything."""
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    try:
        manager.register(module)
    except pluggy.PluginValidationError as error:
        raise HookError(" ".join(str(error).split())) from error
    return manager


def _candidates(module: Any) -> Iterator[tuple[str, str, bool]]:
    """Whatever is a hook or looks like one: attribute, hook's name, whether it is marked. Evaluates no property."""
    for attribute in dir(module):
        value = inspect.getattr_static(module, attribute, None)
        options = getattr(value, _MARK, None) if inspect.isroutine(value) else None
        if isinstance(options, dict):
            if options.get("wrapper") or options.get("hookwrapper"):
                raise HookError(f"its hook {attribute!r} is a wrapper; hooks are called one plugin at a time, there is nothing to wrap")
            yield attribute, options.get("specname") or attribute, True
        elif attribute.startswith("ad_") and inspect.isfunction(value):
            yield attribute, attribute, False


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
