"""What a checkpoint leaves out: buffers that a module computes for itself (rotary frequencies, embedding scales)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ad_core.api.errors import CaptureError

_LARGE = 1 << 20
"""Elements from which on a tensor made in a constructor counts as a weight."""


def computed_buffers(module: nn.Module, build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """The values of all non-persistent buffers of a module that was built on meta, by name, on the CPU. The module is not changed.

    transformers' models fill them in `_init_weights`. For those that do not, `build` makes the module once more, with real memory for
    everything but its weights. Raises `CaptureError` if that does not tell the values either.
    """
    from transformers import PreTrainedModel

    values: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    owners: dict[str, Any] = {}
    for path, part in module.named_modules():
        parent = owners.get(path.rpartition(".")[0])
        owners[path] = part if isinstance(part, PreTrainedModel) else parent
        names = [name for name in part._non_persistent_buffers_set if part._buffers.get(name) is not None]
        if not names:
            continue
        filled = _initialised(part, names, owners[path])
        for name in names:
            full = f"{path}.{name}" if path else name
            if filled.get(name) is not None:
                values[full] = filled[name]
            else:
                missing.append(full)
    if missing:
        values |= _rebuilt(build, missing)
    return values


def _initialised(part: nn.Module, names: list[str], owner: Any) -> Mapping[str, torch.Tensor]:
    """What the owning model's `_init_weights` writes into the buffers; one that it leaves alone is absent.

    Tried on two fillings: what does not depend on the filling was written.
    """
    if owner is None:
        return {}
    own = dict(part._buffers)
    results: list[dict[str, torch.Tensor]] = []
    try:
        for filling in (0, 1):
            for name in names:
                like = own[name]
                assert like is not None
                part._buffers[name] = torch.full(like.shape, filling, dtype=like.dtype, device="cpu")
            with torch.no_grad():
                owner._init_weights(part)
            results.append({name: value for name in names if (value := part._buffers[name]) is not None})
    finally:
        part._buffers.clear()
        part._buffers.update(own)
    first, second = results
    return {name: first[name] for name in names if name in first and torch.equal(first[name], second[name])}


def _rebuilt(build: Callable[[], nn.Module], names: list[str]) -> dict[str, torch.Tensor]:
    """The buffers as the constructor makes them."""
    with torch.device("cpu"), _LargeOnMeta():
        module = build()
    values = {name: value for name, value in module.named_buffers(remove_duplicate=False) if name in set(names)}
    lost = [name for name in names if name not in values or values[name].is_meta]
    if lost:
        raise CaptureError(
            f"nobody knows the values of {', '.join(lost[:4])}",
            where=type(module).__name__,
            why="these buffers are in no checkpoint, and neither the constructor nor _init_weights fills them",
            hint="register them as persistent buffers, or fill them in _init_weights",
        )
    return values


def constants_of(module: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Gives plain tensor attributes (neither parameters nor buffers) the values that their constructor computes.

    A module that was built on meta has none. Changes `module`.
    """
    lost = [(path, part, name) for path, part, name, value in _plain_tensors(module) if value.is_meta]
    if not lost:
        return
    with torch.device("cpu"), _LargeOnMeta():
        values = {(path, name): value for path, _, name, value in _plain_tensors(build())}
    for path, part, name in lost:
        if (value := values.get((path, name))) is not None:
            setattr(part, name, value)


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    for path, part in module.named_modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                yield path, part, name, value


class _LargeOnMeta(TorchFunctionMode):
    """Weights get no memory; small tensors and whatever is computed from them are real."""

    _FACTORIES = (torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._FACTORIES:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if func in (torch.empty, torch.empty_strided) or on_meta.numel() >= _LARGE:
                return on_meta
        return func(*args, **kwargs)
