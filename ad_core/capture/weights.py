"""Weights on their way from a checkpoint onto a graph: one tensor at a time, checked, tied, and none forgotten."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ad_core.api.errors import CheckpointError, GraphInvalidError
from ad_core.api.loading import Checkpoint
from ad_core.capture.conversion import wrong_shape
from ad_core.capture.ties import tied_groups
from ad_core.graph.edit import set_tensor, tensor_at, tensor_path, tensors_read

Progress = Callable[[int, int], None]
"""Told (bytes that are there, bytes of all) after every tensor."""


def read_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    computed: Mapping[str, torch.Tensor],
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Every tensor of `module` (on meta) by every name it has, on `device`: the checkpoint's, and the `computed` buffers.

    Tied names share one tensor. The module is not changed. Raises `CheckpointError` for tensors that are missing or of another shape.
    """
    slots = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
    total, done = sum({id(tensor): tensor.nbytes for tensor in slots.values()}.values()), 0
    weights = {name: value.to(device) for name, value in computed.items()}
    with torch.no_grad():
        for name, value in checkpoint.tensors(module, dtype):
            slot = slots.get(name)
            if slot is None:
                continue
            if value.shape != slot.shape:
                raise wrong_shape(name, value.shape, slot.shape, str(checkpoint.path))
            weights[name] = _placed(value, slot, device)
            done += slot.nbytes
            if progress is not None:
                progress(min(done, total), total)
    for group in tied_groups(module):
        given = next((weights[name] for name in group if name in weights), None)
        if given is not None:
            weights.update(dict.fromkeys(group, given))
    _check_complete(module, weights, slots, checkpoint)
    return weights


def place_weights(graph: GraphModule, weights: Mapping[str, torch.Tensor]) -> int:
    """Puts `weights` under the graph's `get_attr` targets of the same name; nothing is copied. Returns the bytes that the graph now holds.

    A target that `weights` does not name keeps its tensor (a constant of the trace, or one that a pass made). Raises
    `GraphInvalidError` if a tensor is left on meta: computing with it would give garbage without an error.
    """
    seen: dict[int, int] = {}
    by_path = {tensor_path(name): tensor for name, tensor in weights.items()}
    for path in tensors_read(graph):
        if path in by_path:
            set_tensor(graph, path, by_path[path])
        tensor = tensor_at(graph, path)
        if tensor is None or tensor.is_meta:
            raise GraphInvalidError(
                f"the graph reads {path!r}, which has no value", hint="load it from a checkpoint, or fill it in a pass before LOAD ends"
            )
        seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())


def fill_module(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[tuple[dict[str, Any], str, Any]]:
    """Puts `weights` into the module in the place of its meta tensors, sharing memory. Returns what `restore_module` needs."""
    before = []
    for path, part in module.named_modules(remove_duplicate=False):
        for table in (part._parameters, part._buffers):
            for name, tensor in list(table.items()):
                value = weights.get(f"{path}.{name}" if path else name)
                if tensor is not None and value is not None:
                    before.append((table, name, tensor))
                    table[name] = value
    return before


def restore_module(before: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Undoes `fill_module`."""
    for table, name, tensor in reversed(before):
        table[name] = tensor


def _placed(value: torch.Tensor, slot: torch.Tensor, device: torch.device) -> torch.Tensor:
    dtype = slot.dtype if value.is_floating_point() and slot.is_floating_point() else value.dtype
    value = value.to(device=device, dtype=dtype).contiguous()
    if value.untyped_storage().nbytes() > value.nbytes:  # a slice of something larger would keep all of it
        value = value.clone()
    return nn.Parameter(value, requires_grad=False) if isinstance(slot, nn.Parameter) else value


def _check_complete(
    module: nn.Module, weights: Mapping[str, torch.Tensor], slots: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> None:
    optional = [re.compile(pattern) for pattern in getattr(module, "_keys_to_ignore_on_load_missing", None) or ()]
    missing = [name for name in slots if name not in weights and not any(pattern.search(name) for pattern in optional)]
    if missing:
        shown = ", ".join(f"{name} {list(slots[name].shape)}" for name in missing[:4])
        raise CheckpointError(
            f"{len(missing)} of the model's {len(slots)} tensors are not in the checkpoint: {shown}{' ...' if len(missing) > 4 else ''}",
            where=str(checkpoint.path),
            hint="the checkpoint is incomplete, or config.json belongs to another model",
        )
