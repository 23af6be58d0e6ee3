"""From the names and layouts of a checkpoint to those of the module, by transformers' own tables.

In transformers 5 these differ: experts are stored one by one and kept stacked, projections are renamed, fused or split. The tables
(`transformers.conversion_mapping`) say how; here they are applied to one target at a time, so that only its sources are in memory. Stacks
are built in place (`ad_core.capture.stacks`), from one source at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ad_core.api.errors import CheckpointError
from ad_core.capture.stacks import Stored, stacked
from ad_core.capture.ties import tied_groups


@dataclass
class _Target:
    """What becomes one (or, when a tensor is split, several) of the module's tensors. `transform` is None for a plain renaming."""

    name: str
    transform: Any = None
    sources: list[tuple[str, str, Stored]] = field(default_factory=list)
    """(pattern that matched, name in the checkpoint, tensor) in natural order of the names."""


class Conversion:
    """The plan for one checkpoint and one module: nothing is read before `stream`. `unused` are names that the module has no place for."""

    def __init__(self, module: nn.Module, stored: Mapping[str, Stored], where: str):
        self._module, self._where = module, where
        self._slots = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, torch.Tensor)}
        self._ignored = _patterns(module, "_keys_to_ignore_on_load_unexpected")
        self.unused: list[str] = []
        self.targets: dict[str, _Target] = {}
        self._plan(stored)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under the module's name, in the dtype of the module's own. A tied tensor comes once. Raises `CheckpointError`."""
        done: set[int] = set()
        for target in self.targets.values():
            slot = self._slots.get(target.name)
            if slot is not None and id(slot) in done:
                continue
            for name, tensor in self._converted(target):
                place = self._slots.get(name)
                if place is not None:
                    done.add(id(place))
                yield name, tensor

    def separate(self) -> Iterator[str]:
        """Names that the module ties to another and that the checkpoint stores with other values."""
        for group in tied_groups(self._module):
            present = [self.targets[name] for name in group if name in self.targets and self.targets[name].transform is None]
            for other in present[1:]:
                if not _equal(present[0].sources[0][2], other.sources[0][2]):
                    yield other.name

    # -- the plan ---------------------------------------------------------------------------------------------------------

    def _plan(self, stored: Mapping[str, Stored]) -> None:
        renamings, converters = _tables(self._module)
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = getattr(self._module, "base_model_prefix", None)
        for key in sorted(stored, key=_natural):
            name, pattern = _renamed(key, renamings, converters, prefix, self._slots)
            if name not in self._slots and key in self._slots:
                name, pattern = key, None
            if name not in self._slots:
                if not any(ignored.search(name) for ignored in self._ignored):
                    self.unused.append(key)
                continue
            if name not in self.targets:
                transform = deepcopy(by_pattern[pattern]) if pattern is not None else None
                self.targets[name] = _Target(name, transform)
            self.targets[name].sources.append((pattern or key, key, stored[key]))

    def _converted(self, target: _Target) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = self._slots[target.name].dtype
        if target.transform is None:
            yield target.name, self._read(target.sources[-1][2], target.name, dtype)
            return
        whole = stacked(target.transform, target.sources, self._slots[target.name])
        if whole is not None:
            target.sources.clear()
            yield target.name, whole
            return
        for pattern, key, tensor in target.sources:
            # read when its turn comes: the converter calls it
            target.transform.add_tensor(target.name, key, pattern, lambda tensor=tensor: tensor.read(_compatible(tensor, dtype)))
        try:
            values = target.transform.convert(target.name, model=self._module, config=getattr(self._module, "config", None))
        except CheckpointError:
            raise
        except Exception as error:  # any of transformers' operations, on tensors of any shape
            shapes = ", ".join(f"{key} {list(tensor.shape)}" for _, key, tensor in target.sources[:4])
            raise CheckpointError(
                f"the checkpoint's tensors do not fit together to {target.name!r}",
                where=self._where,
                why=f"{type(error).__name__}: {error}; they are {shapes}{' ...' if len(target.sources) > 4 else ''}",
                hint="config.json and the weights may belong to different models",
            ) from error
        target.sources.clear()
        while values:
            name, value = values.popitem()
            yield name, value[0] if isinstance(value, list) else value

    def _read(self, tensor: Stored, name: str, dtype: torch.dtype) -> torch.Tensor:
        want = tuple(self._slots[name].shape)
        if tuple(tensor.shape) != want:  # before it is read: it may be of any size
            raise wrong_shape(name, tensor.shape, want, self._where)
        return tensor.read(_compatible(tensor, dtype))


def wrong_shape(name: str, found: Any, wanted: Any, where: str) -> CheckpointError:
    """The error for a tensor of another shape than the module's."""
    return CheckpointError(
        f"{name!r} has the shape {list(found)} in the checkpoint and {list(wanted)} in the model",
        where=where,
        hint="config.json and the weights belong to different models, or the file is damaged",
    )


def _compatible(tensor: Stored, dtype: torch.dtype) -> torch.dtype | None:
    """Only numbers of floating point are converted; an integer buffer keeps its dtype."""
    return dtype if tensor.dtype.is_floating_point and dtype.is_floating_point else None


def _tables(module: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for this module: none if it is not transformers' or an old transformers has no tables."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    if not isinstance(module, PreTrainedModel):
        return [], []
    mapping = get_model_conversion_mapping(module)
    return [entry for entry in mapping if isinstance(entry, WeightRenaming)], [
        entry for entry in mapping if isinstance(entry, WeightConverter)
    ]


def _renamed(
    key: str, renamings: list[Any], converters: list[Any], prefix: str | None, slots: Mapping[str, torch.Tensor]
) -> tuple[str, str | None]:
    """The module's name for a stored tensor, and the pattern of the converter that it goes through, if any."""
    if not renamings and not converters:
        return _with_prefix(key, prefix, slots), None
    name, pattern = key, None
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        name, pattern = converter.rename_source_key(name)
        if pattern is not None:
            break
    return _with_prefix(name, prefix, slots), pattern


def _with_prefix(name: str, prefix: str | None, slots: Mapping[str, torch.Tensor]) -> str:
    """A checkpoint of the bare model lacks the prefix of the model with a head, or the other way round."""
    if prefix:
        if f"{prefix}.{name}" in slots:
            return f"{prefix}.{name}"
        if name.startswith(f"{prefix}.") and name.removeprefix(f"{prefix}.") in slots:
            return name.removeprefix(f"{prefix}.")
    return name


def _natural(name: str) -> list[tuple[Any, ...]]:
    """Numbers in a name sort by value: expert 10 comes after expert 9."""
    parts: list[tuple[Any, ...]] = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        parts.append((0, int(part)) if part.isdigit() else (1, text, int(digits or -1)))
    return parts


def _patterns(module: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in getattr(module, attribute, None) or ()] + [re.compile(r"rotary_emb\.inv_freq$")]


def _equal(first: Stored, second: Stored) -> bool:
    return first.shape == second.shape and torch.equal(first.read(), second.read())
