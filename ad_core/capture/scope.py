"""Scopes in which a module may be changed: when they close, it is exactly what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Puts back, for every part of `module` and every configuration object it holds: attributes, parameters, buffers, sub-modules, hooks.

    Attributes come back as the same objects, containers among them with their former contents (one level deep). What a tensor
    holds is not restored: nothing may write to one in here.
    """
    before = []
    for owner in [*module.modules(), *configurations(module)]:
        attributes = dict(vars(owner))
        contents = [(value, value.copy()) for value in attributes.values() if isinstance(value, (dict, list, set))]
        before.append((owner, attributes, contents))
    try:
        yield
    finally:
        for owner, attributes, contents in before:
            vars(owner).clear()
            vars(owner).update(attributes)
            for container, content in contents:
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


@contextmanager
def inference_form(module: nn.Module) -> Iterator[None]:
    """While open, every part is in eval mode and every configuration says `use_cache` False. Everything is put back."""
    with untouched(module):
        for part in module.modules():
            part.training = False
        for config in configurations(module):
            if vars(config).get("use_cache"):
                vars(config)["use_cache"] = False
        yield


@contextmanager
def tensors_kept(module: nn.Module) -> Iterator[None]:
    """Puts back what parameters and buffers held, if a forward in here wrote to them in place (some models rescale their weights
    before their first answer). Only tensors that are written to are copied."""
    keeper = _Keeper([*module.parameters(), *module.buffers()])
    try:
        with keeper:
            yield
    finally:
        with torch.no_grad():
            for tensor, content in keeper.kept.values():
                tensor.copy_(content)


class _Keeper(TorchDispatchMode):
    """Copies each of `tensors` just before an op first writes to it, or to a view of it."""

    def __init__(self, tensors: list[torch.Tensor]):
        super().__init__()
        self.tensors = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for position, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                for value in pytree.tree_leaves(kwargs.get(argument.name, args[position] if position < len(args) else None)):
                    key = value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
                    if key is not None and key in self.tensors and key not in self.kept:
                        self.kept[key] = self.tensors[key], self.tensors[key].detach().clone()
        return func(*args, **kwargs)


def configurations(module: nn.Module) -> list[Any]:
    """Every transformers configuration that a part of the module holds, with their sub-configurations, each once."""
    found: dict[int, Any] = {}

    def visit(value: Any) -> None:
        # by name: a module that knows nothing of transformers must not cost its import
        if any(kind.__name__ in ("PreTrainedConfig", "PretrainedConfig") for kind in type(value).__mro__) and id(value) not in found:
            found[id(value)] = value
            for inner in list(vars(value).values()):
                visit(inner)

    for part in module.modules():
        for value in list(vars(part).values()):
            visit(value)
    return list(found.values())
