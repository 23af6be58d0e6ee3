"""A whole plugin in one file: moving averages for the engine. What is imported of us is the contract and `define_op`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ad_core.api import Declined, Kernel, Mixer, OpCall, PluginInfo, Resource, Role, Seam, SlotState, hookimpl

INFO = PluginInfo(name="smooth", api=(1, 0), op_namespaces=("smooth",), summary="moving averages")
OP = "smooth::average"


def _scan(x: Any, decay: Any, state: Any) -> tuple[Any, Any]:
    import torch

    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        state = decay * state + (1 - decay) * x[:, t]
        out[:, t] = state
    return out, state


def _average(x: Any, decay: Any) -> Any:
    import torch

    return _scan(x, decay, torch.zeros_like(x[:, 0]))[0]


def _average_cached(x: Any, decay: Any, state: Any, cu_seqlens: Any, state_slots: Any, fresh: Any) -> Any:
    import torch

    out, bounds = torch.zeros_like(x), cu_seqlens.tolist()
    for row, slot in enumerate(state_slots.tolist()):
        tokens = slice(bounds[row], bounds[row + 1])
        if tokens.start < tokens.stop:
            before = torch.zeros_like(state[slot]) if fresh[row] else state[slot]
            out[:, tokens], after = _scan(x[:, tokens], decay, before[None])
            state[slot] = after[0]
    return out


class Loop(Kernel):
    name = "smooth.loop"
    target = OP
    op = "smooth::average_cached"


class Library(Seam):
    """While it is open, the library's modules call the op in the place of their loop, which cannot be exported."""

    name = "smooth.library"
    produces = OP

    def applies(self, module: Any) -> Declined | None:
        return None if self._found(module) else Declined("it has no Smooth in it")

    @contextmanager
    def open(self, module: Any, entered: Callable[[str], None]) -> Iterator[None]:
        import torch

        def forward_of(part: Any) -> Callable[..., Any]:
            def forward(x: Any) -> Any:
                entered(OP)
                return torch.ops.smooth.average(x, torch.sigmoid(part.rate))

            return forward

        parts = self._found(module)
        try:
            for part in parts:
                part.forward = forward_of(part)
            yield
        finally:
            for part in parts:
                part.__dict__.pop("forward", None)

    @staticmethod
    def _found(module: Any) -> list[Any]:
        return [part for part in module.modules() if type(part).__name__ == "Smooth"]


def _mixer() -> Mixer:
    from ad_core.graph.ops import define_op

    schema = "(Tensor x, Tensor decay, Tensor(a!) state, Tensor cu_seqlens, Tensor state_slots, Tensor fresh) -> Tensor"
    define_op(f"smooth::average_cached{schema}", _average_cached, lambda x, *_: x.new_empty(x.shape))
    canonical = define_op(f"{OP}(Tensor x, Tensor decay) -> Tensor", _average, lambda x, decay: x.new_empty(x.shape))

    class Average(Mixer):
        name = "smooth.average"
        op = canonical
        roles = {"x": Role.TOKEN, "decay": Role.PARAM}
        matchers = (Library(),)
        kernels = (Loop(),)

        def resources(self, call: OpCall, options: Mapping[str, Any]) -> Mapping[str, Resource]:
            return {"state": SlotState((int(call["x"].shape[2]),), call["x"].dtype)}

    return Average()


@hookimpl
def ad_mixers() -> Sequence[Mixer]:
    return [_mixer()]
