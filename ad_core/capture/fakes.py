"""Stand-ins for a module's tensors, so that it can be walked through without computing and without touching its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_weights(module: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """While open, the module's parameters and buffers are fake tensors of `mode` with the same shapes, on `device`; tied ones stay tied.

    The module may be on meta: constants that its forward makes then carry the real device, and no op mixes meta with it. Its own
    tensors come back as the same objects.
    """
    slots: list[tuple[dict[str, Any], str, torch.Tensor | None]] = [
        (table, name, tensor) for part in module.modules() for table in (part._parameters, part._buffers) for name, tensor in table.items()
    ]
    fakes: dict[int, torch.Tensor] = {}
    with mode, torch.no_grad():
        for _, _, tensor in slots:
            if tensor is not None and id(tensor) not in fakes:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    try:
        for table, name, tensor in slots:
            if tensor is not None:
                table[name] = fakes[id(tensor)]
        yield
    finally:
        for table, name, tensor in slots:
            table[name] = tensor
