"""What a module does with positions, seen by running it on nothing but the numbers that do not depend on its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ad_core.capture.fakes import stand_ins
from ad_core.capture.forward import LogitsOnly
from ad_core.capture.scope import inference_form

LENGTH = 11
ENOUGH = 64
"""So many meetings of numbers with weights are watched: positions are looked up, or meet a query as angles, in the first layers."""


class Counting(NamedTuple):
    """`otherwise`: left to itself the module takes other positions than 0, 1, 2 ... `longest`: the longest sequence whose positions all
    have a row in its table; None where it has none. What cannot be seen is False and None."""

    otherwise: bool
    longest: int | None


def counting_of(module: nn.Module, special_ids: frozenset[int], computed: Mapping[str, torch.Tensor]) -> Counting:
    """Watches the module on plain text, left to itself and told 0, 1, 2 ... It may be on meta; `computed` are then its buffers that are
    known, by name."""
    plain = LogitsOnly(module)
    text = [item for item in range(LENGTH + len(special_ids)) if item not in special_ids][:LENGTH]
    ids = torch.tensor([text[::-1]])  # downwards: what rises by one from token to token is a position
    own = _meetings(plain, ids, None, computed)
    longest = min((rows - first for meeting in own for first, rows in meeting.positions()), default=None)
    if not plain.form.positions:
        return Counting(False, longest)
    for mine, told in zip(own, _meetings(plain, ids, torch.arange(LENGTH)[None], computed), strict=False):
        if mine.op is not told.op or mine.numbers.numel() != told.numbers.numel():
            break  # two different roads, which cannot be held side by side
        if not torch.equal(mine.numbers.flatten(), told.numbers.flatten()):
            return Counting(True, longest)
    return Counting(False, longest)


class _Meeting(NamedTuple):
    """An op that was given `numbers` together with weights; `rows` if it looked them up in so many."""

    op: Any
    numbers: torch.Tensor
    rows: int | None

    def positions(self) -> list[tuple[int, int]]:
        """(the first, rows) if these are positions that were looked up, else nothing."""
        values = self.numbers.flatten().tolist() if self.rows is not None and self.numbers.numel() == LENGTH else []
        return [(values[0], self.rows)] if self.rows and values == list(range(values[0], values[0] + LENGTH)) else []


def _meetings(plain: LogitsOnly, ids: torch.Tensor, positions: torch.Tensor | None, computed: Mapping[str, torch.Tensor]) -> list[_Meeting]:
    """In order, up to where the module's forward ends or raises."""

    def weightless(path: str, tensor: torch.Tensor) -> torch.Tensor:
        known = computed.get(path, tensor)
        weight = isinstance(tensor, nn.Parameter) or known.is_meta
        return tensor.to("meta") if weight else known.to("cpu", copy=True)

    watch = _Watch()
    with inference_form(plain.module), stand_ins(plain.module, weightless), torch.no_grad(), watch, suppress(Exception):
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
            rows = args[0].shape[0] if func is torch.ops.aten.embedding.default else None
            self.met += [_Meeting(func, tensor.detach().clone(), rows) for tensor in numbers]
            if len(self.met) >= ENOUGH:
                raise _Enough
            args, given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, given))
        elif "device" in given:
            given["device"] = torch.device("cpu")
        return func(*args, **given)
