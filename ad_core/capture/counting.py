"""What a module does with positions, seen by running it on nothing but the numbers that do not depend on its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ad_core.capture.fakes import stand_ins
from ad_core.capture.forward import LogitsOnly
from ad_core.capture.scope import inference_form

LENGTH, OTHER_LENGTH = 11, 14
ENOUGH = 64
"""So many meetings of numbers with weights are watched: positions are looked up, or meet a query as angles, in the first layers."""
SMALL = 1 << 20
"""Elements up to which a buffer's numbers are known, and those that an op meets are noted: larger ones are weights in disguise."""
LONG = 2048
"""Rows up to which a table is tried with more tokens than it has rows: a module may hold positions back at its end."""


class Counting(NamedTuple):
    """`otherwise`: left to itself the module takes other positions than 0, 1, 2 ... `longest`: the longest sequence whose positions all
    have a row in its table; None where it has none. What cannot be seen is False and None."""

    otherwise: bool = False
    longest: int | None = None


def counting_of(module: nn.Module, special_ids: frozenset[int], computed: Mapping[str, torch.Tensor]) -> Counting:
    """Watches a copy of the module without weights on plain text, left to itself and told 0, 1, 2 ... The module may be on meta;
    `computed` are then its buffers that are known, by name."""
    padding = {part.padding_idx for part in module.modules() if isinstance(part, nn.Embedding) and part.padding_idx is not None}
    try:
        plain = LogitsOnly(_weightless(module, computed))
        return _counting(plain, special_ids | padding)
    except Exception:  # the author's classes: what cannot be copied cannot be watched
        return Counting()


def _counting(plain: LogitsOnly, not_text: frozenset[int]) -> Counting:
    def own(length: int) -> list[_Meeting]:
        return _meetings(plain, _text(length, not_text), None)

    seen = own(LENGTH)
    tables = [index for index, meeting in enumerate(seen) if meeting.first(LENGTH) is not None]
    for length in {max(seen[index].rows + 1, OTHER_LENGTH) if seen[index].rows <= LONG else OTHER_LENGTH for index in tables}:
        longer = own(length)
        # a forward that breaks at so many tokens before it looks them up holds none back
        tables = [index for index in tables if index >= len(longer) or longer[index].first(length) == seen[index].first(LENGTH)]
    longest = min((seen[index].rows - (seen[index].first(LENGTH) or 0) for index in tables), default=None)
    if not plain.form.positions:
        return Counting(False, longest)
    for mine, told in zip(seen, _meetings(plain, _text(LENGTH, not_text), torch.arange(LENGTH)[None]), strict=False):
        if mine.op is not told.op or mine.numbers.numel() != told.numbers.numel():
            break  # two different roads, which cannot be held side by side
        if not torch.equal(mine.numbers.flatten(), told.numbers.flatten()):
            return Counting(True, longest)
    return Counting(False, longest)


def _text(length: int, not_text: frozenset[int]) -> torch.Tensor:
    """Ids [1, S], downwards: what rises by one from token to token is a position."""
    return torch.tensor([[item for item in range(length + len(not_text)) if item not in not_text][:length][::-1]])


def _weightless(module: nn.Module, computed: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy, so that nothing that its forward keeps is left in the module. Raises what copying a module raises."""

    def stand_in(path: str, tensor: torch.Tensor) -> torch.Tensor:
        known = computed.get(path, tensor)
        weight = isinstance(tensor, nn.Parameter) or known.is_meta or known.numel() > SMALL
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if weight else known.to("cpu", copy=True)

    with stand_ins(module, stand_in):
        return deepcopy(module)


class _Meeting(NamedTuple):
    """An op that was given `numbers` together with weights; `rows` of the table if it looked them up in one, else 0."""

    op: Any
    numbers: torch.Tensor
    rows: int

    def first(self, length: int) -> int | None:
        """The first of these numbers, if they are positions of so many tokens that were looked up."""
        values = self.numbers.flatten().tolist() if self.rows and self.numbers.numel() == length else []
        return values[0] if values and values == list(range(values[0], values[0] + length)) else None


def _meetings(plain: LogitsOnly, ids: torch.Tensor, positions: torch.Tensor | None) -> list[_Meeting]:
    """In order, up to where the module's forward ends or raises."""
    watch = _Watch()
    with inference_form(plain.module), torch.no_grad(), watch, suppress(Exception):
        plain(ids, positions)  # it may ask for a number that only weights could give
    return watch.met


class _Enough(Exception):
    """Nothing more need be seen."""


class _Watch(TorchDispatchMode):
    """What depends on no weight is computed. An op that reads a weight, or what came of one, has shapes only, and what else it reads is
    noted."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[_Meeting] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, given)) if isinstance(leaf, torch.Tensor)]
        numbers = [tensor for tensor in tensors if tensor.device.type != "meta"]
        if len(numbers) < len(tensors):
            rows = args[0].shape[0] if func is torch.ops.aten.embedding.default else 0
            self.met += [_Meeting(func, tensor.detach().clone(), rows) for tensor in numbers if tensor.numel() <= SMALL]
            if len(self.met) >= ENOUGH:
                raise _Enough
            args, given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, given))
        elif "device" in given:
            given["device"] = torch.device("cpu")
        result = func(*args, **given)
        if isinstance(result, torch.Tensor) and "empty" in func.__name__:
            return result.to("meta")  # what fills it later may depend on weights
        return result
