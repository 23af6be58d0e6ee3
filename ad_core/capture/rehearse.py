"""A run of the module on fake tensors of fixed shape, before it is exported: cheap, and it shows what the export may skip.

Tracing with symbolic shapes costs milliseconds an op; this run costs a tenth of it. It tells which calls of repeated blocks (the layers)
do exactly the same: the same ops with the same constants on inputs of the same form, with only their own weights and
their varying inputs in different places. Such calls need to be traced only once (`ad_core.capture.repeats`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ad_core.graph.ops import qualified_name


@dataclass
class BlockCall:
    """One call of a block. `inputs` and `outputs` say of every leaf what it is: ("tensor", ...) or a constant.

    `stream` holds its ops in order, arguments named by where they come from. `faults` says why the call cannot be skipped.
    """

    number: int
    path: str
    block: nn.Module
    inputs: list[Hashable] = field(default_factory=list)
    sources: list[Hashable] = field(default_factory=list)
    """What each input leaf is in the whole run; equal sources are the same tensor."""
    outputs: list[Hashable] = field(default_factory=list)
    trees: tuple[Any, Any] = (None, None)
    stream: list[Hashable] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def does_the_same_as(self, other: BlockCall) -> bool:
        """Whether both calls compute the same function of their varying inputs and of the block's own weights.

        The ops at one length do not tell what a block does at another (`min(self.window, length)`), so its numbers count too.
        """
        mine, theirs = ((call.inputs, call.outputs, call.trees, call.stream) for call in (self, other))
        if self.faults or other.faults or mine != theirs:
            return False
        places = [call.path.rpartition(".")[2] for call in (self, other)]
        distance = int(places[0]) - int(places[1]) if all(place.isdigit() for place in places) else 0
        return self.block is other.block or same_settings(self.block, other.block, distance)


class Rehearsal(TorchDispatchMode):
    """Records the calls of blocks while it is active. `calls` is in the order of the run; `executed` counts the ops outside of ATen."""

    def __init__(self, root: nn.Module):
        super().__init__()
        self.calls: list[BlockCall] = []
        self.executed: Counter[str] = Counter()
        self._open: BlockCall | None = None
        self._local: dict[int, Hashable] = {}
        self._names: dict[int, Hashable] = {}
        self._alive: list[Any] = []
        self._made_by: dict[int, BlockCall] = {}
        self._returned: set[int] = set()
        self._weights = _weight_names(root)

    def run_block(self, number: int, path: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs `forward` of the block as a call of its own."""
        call = BlockCall(number, path, block)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        self._local = {}
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                first = self._local.setdefault(id(leaf), ("input", position))
                call.inputs.append(("tensor", first, *_form(leaf)))
                call.sources.append(self._name(leaf))
            else:
                call.inputs.append(self._constant(leaf))
                call.sources.append(None)
        self._open = call
        try:
            result = forward(*args, **kwargs)
        finally:
            self._open = None
        outputs, out_tree = pytree.tree_flatten(result)
        for leaf in outputs:
            if isinstance(leaf, torch.Tensor):
                where = self._describe(leaf, call)
                call.outputs.append(("tensor", where, *_form(leaf)))
                self._returned.add(id(leaf))
                if where[0] not in ("input", "made"):  # type: ignore[index]
                    call.faults.append("it returns a tensor that it did not make")
            else:
                constant = self._constant(leaf)
                call.outputs.append(constant)
                if constant[0] == "object" and constant not in call.inputs:  # type: ignore[index]
                    call.faults.append(f"it returns a {type(leaf).__name__}")
        call.trees = (tree, out_tree)
        self.calls.append(call)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prim", "prims"):
            self.executed[qualified_name(func)] += 1
        described = self._describe_all((args, kwargs))
        if self._open is not None and func._schema.is_mutable:
            self._check_writes(func, args, kwargs, self._open)
        result = func(*args, **kwargs)
        for position, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self._names:
                self._alive.append(leaf)
                self._names[id(leaf)] = ("made", len(self._alive))
                if self._open is not None:
                    self._made_by[id(leaf)] = self._open
                    self._local[id(leaf)] = ("made", len(self._open.stream), position)
        if self._open is not None:
            self._open.stream.append((str(func), described))
        return result

    def _describe_all(self, value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            return self._describe(value, self._open)
        if isinstance(value, (list, tuple)):
            return tuple(self._describe_all(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, self._describe_all(item)) for name, item in value.items())
        return self._constant(value)

    def _describe(self, tensor: torch.Tensor, call: BlockCall | None) -> Hashable:
        """Where a tensor comes from, as `call` sees it: its inputs, what it made, its own weights, or the world outside."""
        maker = self._made_by.get(id(tensor))
        if maker is not None and maker is not call and id(tensor) not in self._returned:
            maker.faults.append("something outside of it uses a tensor that it did not return")
        if call is None:
            return None
        if id(tensor) in self._local:
            return self._local[id(tensor)]
        names = self._weights.get(id(tensor), ())
        prefix = f"{call.path}."
        if names and all(name.startswith(prefix) for name in names):
            return ("weight", tuple(name.removeprefix(prefix) for name in names))
        return ("outside", self._name(tensor))

    def _name(self, tensor: torch.Tensor) -> Hashable:
        if id(tensor) not in self._names:
            self._alive.append(tensor)  # an id is unique only among the living
            self._names[id(tensor)] = ("given", len(self._alive))
        return self._names[id(tensor)]

    def _constant(self, value: Any) -> Hashable:
        if value is None or isinstance(
            value, (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        ):
            return ("constant", type(value).__name__, repr(value))
        self._alive.append(value)
        return ("object", id(value))

    def _check_writes(self, func: Any, args: Any, kwargs: Any, call: BlockCall) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name) if argument.kwarg_only else (args[position] if position < len(args) else None)
                for tensor in pytree.tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and self._local.get(id(tensor), ("",))[0] != "made":  # type: ignore[index]
                        call.faults.append(f"it writes to a tensor from outside ({func})")


def same_settings(first: nn.Module, second: nn.Module, distance: int) -> bool:
    """Whether two blocks are of the same classes with the same numbers, texts and flags as attributes in every part.

    `distance` is how far apart they lie in their list: whole numbers that differ by it are their places in it.
    """

    def same(mine: Any, its: Any) -> bool:
        if type(mine) is not type(its):
            return False
        if isinstance(mine, (list, tuple)):
            return len(mine) == len(its) and all(same(a, b) for a, b in zip(mine, its, strict=True))
        if type(mine) is int:
            return bool(mine == its or mine - its == distance)
        return not isinstance(mine, (str, bytes, bool, float, complex)) or repr(mine) == repr(its)

    parts = list(zip(first.modules(), second.modules(), strict=False))
    if len(parts) != len(list(first.modules())) or len(parts) != len(list(second.modules())):
        return False
    for mine, its in parts:
        if type(mine) is not type(its) or vars(mine).keys() != vars(its).keys():
            return False
        if not all(same(value, vars(its)[name]) for name, value in vars(mine).items() if name != "forward"):
            return False
    return True


def _form(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _weight_names(root: nn.Module) -> dict[int, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for tensors in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
    return {key: tuple(found) for key, found in names.items()}


@contextmanager
def block_calls(root: nn.Module, run: Callable[[int, str, nn.Module, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """While open, every outermost call of a block goes through `run(number, path, block, forward, args, kwargs)`, numbered in order.

    Blocks are the members of module lists that have parts of their own: the layers. A block inside a block is left alone.
    """
    state = {"depth": 0, "calls": 0}
    blocks: list[nn.Module] = []

    def routed(block: nn.Module, path: str) -> Callable[..., Any]:
        original = block.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if state["depth"]:
                return original(*args, **kwargs)
            state["depth"] += 1
            number = state["calls"]
            state["calls"] += 1
            try:
                return run(number, path, block, original, args, kwargs)
            finally:
                state["depth"] -= 1

        return forward

    try:
        for path, block in _blocks(root):
            if "forward" not in vars(block):
                block.forward = routed(block, path)  # type: ignore[method-assign]
                blocks.append(block)
        yield
    finally:
        for block in blocks:
            del block.forward


def _blocks(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in root.named_modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > 1:
            for name, block in part.named_children():
                if next(block.children(), None) is not None:
                    yield f"{path}.{name}" if path else name, block
