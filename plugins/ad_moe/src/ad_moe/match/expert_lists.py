"""Blocks that keep their experts in a list of modules and loop over it: a user's own, or one from the library's earlier releases.

No class is known by name. A copy of the block with tiny layers is run, and what it answers tells which way of routing, which activation
and which order of projections the block has. What agrees with none is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ad_core.graph.seams import Entered, ForwardSeam
from ad_moe.gating import ACTIVATIONS
from ad_moe.match.call import OP, experts

_DEPTH, _INNER = 8, 6
"""Widths of the tiny layers: different, so that a block that takes one for the other fails."""

Routing = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

ROUTINGS: dict[str, Routing] = {
    "softmax, best, normalised": lambda logits, k: _best(logits.softmax(-1, dtype=torch.float32), k, normalised=True),
    "softmax, best": lambda logits, k: _best(logits.softmax(-1, dtype=torch.float32), k, normalised=False),
    "sigmoid, best, normalised": lambda logits, k: _best(logits.float().sigmoid(), k, normalised=True),
    "sigmoid, best": lambda logits, k: _best(logits.float().sigmoid(), k, normalised=False),
}
"""From the router's logits [T, E] to weights and experts, each [T, K]. A softmax over the best logits alone is the first one."""


def _best(scores: torch.Tensor, k: int, *, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    weights, selected = scores.topk(k, -1)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights, selected


@dataclass(frozen=True)
class Reading:
    """What a block was found to compute. `projections` names the experts' gate, up and down (gate "" if they have none)."""

    router: str
    choices: int
    routing: str
    activation: str
    projections: tuple[str, str, str]
    gives_logits: bool


class ExpertListSeam(ForwardSeam):
    """A block with a linear router and a list of equal experts of two or three linear layers without biases."""

    name = "experts.list"
    produces = OP

    def __init__(self) -> None:
        self._read: WeakKeyDictionary[nn.Module, Reading | None] = WeakKeyDictionary()

    def reaches(self, part: nn.Module) -> bool:
        return self._reading(part) is not None

    def forward(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        reading = self._reading(part)
        assert reading is not None
        members: Any = part.experts

        def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
            """[B, S, D] -> [B, S, D], with the router's logits [T, E] beside it if the block gives them."""
            entered(OP)
            return _computed(part, reading, members, hidden)

        return forward

    def _reading(self, part: nn.Module) -> Reading | None:
        if part not in self._read:
            self._read[part] = read(part)
        return self._read[part]


def read(part: nn.Module) -> Reading | None:
    """How the block routes and what its experts compute, or None if it is no such block or agrees with nothing that is known."""
    members = getattr(part, "experts", None)
    if not isinstance(members, nn.ModuleList) or len(members) < 2 or len({type(member) for member in members}) != 1:
        return None
    first = {name: layer for name, layer in members[0].named_children() if isinstance(layer, nn.Linear)}
    routers = [name for name, child in part.named_children() if isinstance(child, nn.Linear) and child.out_features == len(members)]
    layers = [*first.values(), *(getattr(part, name) for name in routers)]
    other = [parameter for parameter in part.parameters() if parameter.dim() != 2]
    if len(first) not in (2, 3) or len(routers) != 1 or other or any(layer.bias is not None for layer in layers):
        return None
    if len([name for name in inspect.signature(part.forward).parameters if name not in ("args", "kwargs")]) < 1:
        return None
    return _tried(part, routers[0], first)


def _tried(part: nn.Module, router: str, layers: dict[str, nn.Linear]) -> Reading | None:
    depth = getattr(part, router).in_features
    small = _shrunken(part, router, depth)
    x = torch.randn(1, 9, _DEPTH, generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            wanted = small(x)
    except Exception:  # any code of the author's: one that insists on its sizes is not read
        return None
    gives_logits = isinstance(wanted, tuple)
    result = wanted[0] if gives_logits else wanted
    if not isinstance(result, torch.Tensor) or result.shape != x.shape or (gives_logits and len(wanted) != 2):
        return None
    for reading in _readings(part, small, router, layers, gives_logits):
        with torch.no_grad():
            found = _computed(small, reading, small.experts, x)
        both = zip(found, wanted, strict=True) if gives_logits else [(found, wanted)]
        if all(isinstance(b, torch.Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in both):
            return reading
    return None


def _readings(part: nn.Module, small: Any, router: str, names: Iterable[str], gives_logits: bool) -> Iterator[Reading]:
    number = len(small.experts)
    counts = {value for value in vars(part).values() if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= number}
    orders = [order if len(order) == 3 else ("", *order) for order in permutations(names)]
    fitting = [order for order in orders if getattr(small.experts[0], order[2]).out_features == _DEPTH]
    for choices, routing, activation, order in product(sorted(counts), ROUTINGS, ACTIVATIONS, fitting):
        yield Reading(router, choices, routing, activation, order, gives_logits)  # type: ignore[arg-type]


def _shrunken(part: nn.Module, router: str, depth: int) -> Any:
    """A copy whose linear layers are tiny and random. The weights of the block itself, which may be huge or on meta, are not copied."""
    skipped = {id(tensor): torch.empty(0) for tensor in part.parameters()}
    small = deepcopy(part, dict(skipped)).eval()
    generator = torch.Generator().manual_seed(0)

    def tiny(layer: nn.Linear, rows: int, columns: int) -> nn.Linear:
        made = nn.Linear(columns, rows, bias=False, device="cpu", dtype=torch.float32)
        made.weight = nn.Parameter(1.5 * torch.randn(rows, columns, generator=generator) * columns**-0.5, requires_grad=False)
        return made

    setattr(small, router, tiny(getattr(part, router), len(part.experts), _DEPTH))  # type: ignore[arg-type]
    for old, new in zip(part.experts, small.experts, strict=True):  # type: ignore[arg-type]
        for name, layer in old.named_children():
            if isinstance(layer, nn.Linear):
                narrow = layer.out_features == depth and name not in _widening(old, depth)
                setattr(new, name, tiny(layer, *((_DEPTH, _INNER) if narrow else (_INNER, _DEPTH))))
    return small


def _widening(expert: nn.Module, depth: int) -> set[str]:
    """Names of the layers that take the token: by shape, or, where widths are equal, all but the one that is called down or comes last."""
    layers = {name: layer for name, layer in expert.named_children() if isinstance(layer, nn.Linear)}
    if any(layer.out_features != layer.in_features for layer in layers.values()):
        return {name for name, layer in layers.items() if layer.in_features == depth}
    last = next((name for name in layers if "down" in name or name == "w2"), list(layers)[-1])
    return layers.keys() - {last}


def _computed(part: Any, reading: Reading, members: Any, hidden: torch.Tensor) -> Any:
    """The block's answer as the reading has it."""
    logits = getattr(part, reading.router)(hidden.flatten(0, -2))
    weights, selected = ROUTINGS[reading.routing](logits, reading.choices)
    gate, up, down = reading.projections

    def stack(name: str) -> torch.Tensor:
        return torch.stack([getattr(member, name).weight for member in members])

    result = experts(
        hidden,
        selected,
        weights.to(hidden.dtype),
        stack(up),
        stack(down),
        gate=stack(gate) if gate else None,
        layout="separate" if gate else "none",
        activation=reading.activation,
    )
    return (result, logits) if reading.gives_logits else result
