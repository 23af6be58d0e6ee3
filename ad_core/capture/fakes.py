"""Stand-ins for a module's tensors, so that it can be walked through without computing and without touching its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_weights(module: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """While open, the module's parameters and buffers are fake tensors of `mode` with the same shapes, on `device`.

    The module may be on meta: constants that its forward makes then carry the real device, and no op mixes meta with it.
    """

    def fake(path: str, tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with stand_ins(module, fake):
        yield


@contextmanager
def stand_ins(module: nn.Module, make: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While open, the module's parameters and buffers are what `make` gives for their path and themselves; tied ones stay tied.

    Its own tensors come back as the same objects.
    """
    slots: list[tuple[dict[str, Any], str, str, torch.Tensor | None]] = [
        (table, name, f"{path}.{name}" if path else name, tensor)
        for path, part in module.named_modules(remove_duplicate=False)
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
    ]
    made: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for _, _, path, tensor in slots:
            if tensor is not None and id(tensor) not in made:
                stand_in = make(path, tensor)
                made[id(tensor)] = nn.Parameter(stand_in, requires_grad=False) if isinstance(tensor, nn.Parameter) else stand_in
    try:
        for table, name, _, tensor in slots:
            if tensor is not None:
                table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, _, tensor in slots:
            table[name] = tensor
