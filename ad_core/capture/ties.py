"""Tensors that a module holds under several names."""

from __future__ import annotations

from torch import nn


def tied_groups(module: nn.Module) -> list[tuple[str, ...]]:
    """The names of every parameter or buffer that has more than one, in the module's order."""
    names: dict[int, list[str]] = {}
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def untie(module: nn.Module, name: str) -> None:
    """Gives `name` a parameter of its own, of the same form (on meta: a checkpoint will fill it)."""
    owner_path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_path)
    old = owner._parameters[leaf]
    assert old is not None
    owner._parameters[leaf] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
