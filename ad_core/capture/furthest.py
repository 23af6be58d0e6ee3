"""How far positions go, while a module is traced: code that asks for the last of them is told what holds for every sequence that is served.

Rotary tables for long texts are the reason: which table a model takes depends on the length of the whole sequence. Up to some length
it is always the same, and then the question has an answer; beyond, all that is kept of a sequence would change when it has grown.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from ad_core.api.errors import ConfigError
from ad_core.graph.edit import tensor_at, tensors_read


@dataclass
class Horizon:
    """The longest sequence that is served, None if it is not known. `limit`: up to how many tokens all comparisons come out as they
    do for a short one, if that is less. Those that do not are answered for a short sequence, or, if `beyond`, for the longest."""

    longest: int | None
    beyond: bool = False
    limit: int | None = None

    def watching(self, positions: torch.Tensor | None) -> AbstractContextManager[Any]:
        """Answers what is asked of `positions`, any numbers from 0 to `longest` - 1."""
        return nullcontext() if self.longest is None or positions is None else _Answers(self, self.longest, positions)

    def check(self, short: GraphModule, trace: Callable[[Horizon], GraphModule]) -> None:
        """Raises `ConfigError` if the module, traced once more for the longest sequence, is not what it is for a `short` one."""
        if self.limit is None:
            return
        try:
            same = _same(short, trace(Horizon(self.longest, beyond=True)))
        except Exception:  # any code of the author's, which may not even be traceable there
            same = False
        if not same:
            raise ConfigError(
                f"the model computes something else for sequences of more than {self.limit} tokens",
                why=f"up to {self.longest} may be served, and what is kept of a sequence's first tokens would change once it has grown",
                hint=f"give max_model_len={self.limit}",
            )


@dataclass(frozen=True)
class _Range:
    """Every element is at least `low` and at most the longest sequence's last position plus `offset`."""

    low: int
    offset: int = 0


class _Answers(TorchFunctionMode):
    """Decides comparisons of the largest position with a number."""

    def __init__(self, horizon: Horizon, longest: int, positions: torch.Tensor):
        super().__init__()
        self._horizon, self._longest = horizon, longest
        self._alive: list[Any] = [positions]
        self._ranges = {id(positions): _Range(0)}
        self._decided: dict[int, bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        known = self._ranges.get(id(first)) if first is not None else None
        if func is torch.Tensor.__bool__ and id(first) in self._decided:
            return self._decided[id(first)]
        if func is torch.Tensor.__bool__ and known is not None and known.low > 0:
            return True
        if func in (torch.where, torch.Tensor.where) and id(first) in self._decided and len(args) == 3 and _same_shape(*args[1:]):
            chosen: torch.Tensor = args[1] if self._decided[id(first)] else args[2]
            return chosen.to(torch.promote_types(args[1].dtype, args[2].dtype))
        result = func(*args, **kwargs)
        if known is not None and isinstance(result, torch.Tensor):
            self._follow(func, args[1:], kwargs, known, result)
        return result

    def _follow(self, func: Any, others: tuple[Any, ...], kwargs: Any, known: _Range, result: torch.Tensor) -> None:
        number = others[0] if len(others) == 1 and not kwargs and isinstance(others[0], int | float) else None
        compare = _COMPARISONS.get(func)
        if result.dtype in _EXACT and (func in _SAME_VALUES or (func in _LARGEST and result.dim() == 0)):
            self._keep(result, self._ranges, known)
        elif func in _SHIFTS and isinstance(number, int):
            shift = _SHIFTS[func] * number
            self._keep(result, self._ranges, _Range(known.low + shift, known.offset + shift))
        elif compare is not None and number is not None and result.dim() == 0:
            self._keep(result, self._decided, self._decide(compare, known, number))

    def _keep(self, result: torch.Tensor, table: dict[int, Any], value: Any) -> None:
        self._alive.append(result)  # ids of what is gone are given away again
        table[id(result)] = value

    def _decide(self, compare: Callable[[float, float], bool], known: _Range, number: float) -> bool:
        short, long = compare(known.low, number), compare(self._longest - 1 + known.offset, number)
        if short == long:
            return short
        last = math.floor(number) if compare(number, number) == short else math.ceil(number) - 1
        limit = last - known.offset + 1
        self._horizon.limit = min(limit, self._horizon.limit or limit)
        return long if self._horizon.beyond else short


def _same_shape(one: Any, other: Any) -> bool:
    return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape


def _same(one: GraphModule, other: GraphModule) -> bool:
    if str(one.graph) != str(other.graph):
        return False
    pairs = [(tensor_at(one, path), tensor_at(other, path)) for path in tensors_read(one)]
    return all(mine is its or (mine is not None and its is not None and torch.equal(mine, its)) for mine, its in pairs)


_EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)
"""Every position is itself in these."""

_T = torch.Tensor
_LARGEST = frozenset({torch.max, _T.max, torch.amax, _T.amax})
_SAME_VALUES = frozenset(
    {
        *(_T.to, _T.int, _T.long, _T.clone, torch.clone, _T.contiguous, _T.detach, _T.__getitem__),
        *(_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.expand, _T.unsqueeze, torch.unsqueeze),
        *(_T.squeeze, torch.squeeze, _T.transpose, torch.transpose, _T.permute, torch.permute),
    }
)
_SHIFTS = {_T.add: 1, torch.add: 1, _T.__add__: 1, _T.__radd__: 1, _T.sub: -1, torch.sub: -1, _T.__sub__: -1}
_COMPARISONS: dict[Any, Callable[[float, float], bool]] = {
    **dict.fromkeys((_T.__gt__, _T.gt, torch.gt), operator.gt),
    **dict.fromkeys((_T.__ge__, _T.ge, torch.ge), operator.ge),
    **dict.fromkeys((_T.__lt__, _T.lt, torch.lt), operator.lt),
    **dict.fromkeys((_T.__le__, _T.le, torch.le), operator.le),
}
