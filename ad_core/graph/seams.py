"""Seams of two common kinds, for plugins to subclass: a library's function that is marked for replacement, and a module's forward."""

from __future__ import annotations

import ast
import inspect
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined, Seam

if TYPE_CHECKING:
    from torch import nn

Entered = Callable[[str], None]
"""Called with the canonical op's name each time that the op is put in."""


class MarkedFunctionSeam(Seam):
    """Swaps the module-level functions that stand for a library's kernel, in the file of the model's class. Files and classes differ
    from model to model, marks do not.

    A function stands for the kernel if it is marked as replaceable by it, `@decorator("MARK", ...)` above its `def`; if it was imported
    from a file that marks it; or if it has the kernel's own name, imported from the kernel's library or written in its place.
    """

    mark: str
    """The decorator's first argument: the name of the kernel."""

    @abstractmethod
    def replacement(self, original: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
        """What is called in the place of `original`, with its arguments. It raises `CaptureError` for a call that the canonical op
        would not compute, and else calls `entered(self.produces)` once a call of the op."""

    def applies(self, module: nn.Module) -> Declined | None:
        """Declines modules none of whose classes reads a function with the mark."""
        if self._found(module):
            return None
        return Declined(f"no class in {type(module).__name__} calls a function that is marked {self.mark!r}")

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        found = self._found(module)
        before = [vars(file)[name] for file, name in found]
        try:
            for (file, name), original in zip(found, before, strict=True):
                setattr(file, name, self.replacement(original, entered))
            yield
        finally:
            for (file, name), original in zip(found, before, strict=True):
                setattr(file, name, original)

    def _found(self, module: nn.Module) -> list[tuple[ModuleType, str]]:
        """Where the functions are that the module's parts read."""
        found: dict[tuple[str, str], tuple[ModuleType, str]] = {}
        for kind in {type(part): None for part in module.modules()}:
            for base in kind.__mro__:
                file = sys.modules.get(base.__module__)
                if file is None or base.__module__.startswith("torch.") or base.__module__ == "builtins":
                    continue
                for name in _names(base):
                    if _stands_for(file, name, self.mark):
                        found[file.__name__, name] = file, name
        return list(found.values())


class ForwardSeam(Seam):
    """Swaps the forward of those parts of a model that `reaches` accepts, for code that no function or interface opens up."""

    @abstractmethod
    def reaches(self, part: nn.Module) -> bool:
        """Whether `part` is one that this seam knows: by its class's name and, where names are not enough, by what it holds."""

    @abstractmethod
    def forward(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        """The forward in the place of the part's own, with its arguments and result. The same duties as `replacement` above."""

    def applies(self, module: nn.Module) -> Declined | None:
        if any(self.reaches(part) for part in module.modules()):
            return None
        return Declined(f"{type(module).__name__} has no part that {self.name} knows")

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        parts = [part for part in module.modules() if self.reaches(part)]
        before = [vars(part).get("forward", _MISSING) for part in parts]
        try:
            for part in parts:
                vars(part)["forward"] = self.forward(part, entered)
            yield
        finally:
            for part, forward in zip(parts, before, strict=True):
                if forward is _MISSING:
                    vars(part).pop("forward", None)
                else:
                    vars(part)["forward"] = forward


_MISSING = object()


def _stands_for(file: ModuleType, name: str, mark: str) -> bool:
    """Whether the file's global `name` is a function in the place of the kernel `mark`."""
    own_mark = _marks(file).get(name)
    function = vars(file).get(name)
    if own_mark is not None or not callable(function) or isinstance(function, type):
        return own_mark == mark
    called = getattr(function, "__name__", None)
    home = sys.modules.get(getattr(function, "__module__", None) or "")
    if home is not None and home is not file and _mentions(home, mark) and (home_mark := _marks(home).get(called or "")) is not None:
        return home_mark == mark
    return called == mark


@cache
def _mentions(file: ModuleType, mark: str) -> bool:
    """Whether the mark is in the file's source at all, which is told sooner than where."""
    try:
        return mark in inspect.getsource(file)
    except (OSError, TypeError):
        return False


@cache
def _marks(file: ModuleType) -> dict[str, str]:
    """Function names of a file with the first argument, where it is a text, of a decorator on each. Nothing where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(file))
    except (OSError, TypeError, SyntaxError):
        return {}
    return {
        node.name: decorator.args[0].value
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and decorator.args
        if isinstance(decorator.args[0], ast.Constant) and isinstance(decorator.args[0].value, str)
    }


@cache
def _names(kind: type) -> frozenset[str]:
    """Every global or attribute name that the class's own methods read."""

    def of(code: CodeType) -> set[str]:
        return set(code.co_names).union(*(of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))

    found: set[str] = set()
    for member in vars(kind).values():
        function = getattr(member, "__func__", member)
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        if isinstance(function, FunctionType):
            found |= of(function.__code__)
    return frozenset(found)
