"""The seam of RWKV-4: the function that its layers call for the weighted sum, and the halving that its model does to its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ad_core.api import Declined, Seam
from ad_core.api.errors import CaptureError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ad_core.graph.seams import Entered

_FUNCTION = "rwkv_linear_attention"


class WkvFunction(Seam):
    """The model halves the output weights of its later blocks in place before its first forward in eval mode, and the stream of
    hidden states as often, against overflow in half precision. What is captured halves the results instead: the same numbers, as
    two has no rounding, from weights as they are on disk."""

    name = "rnn.wkv_function"
    produces = "ad_rnn::wkv4"

    def applies(self, module: nn.Module) -> Declined | None:
        return None if self._files(module) else Declined(f"{type(module).__name__} has no layer that calls {_FUNCTION}")

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        files = self._files(module)
        functions = [vars(file)[_FUNCTION] for file in files]
        halved = list(_halved(module))
        models = [part for part in module.modules() if vars(part).get("layers_are_rescaled") is False]
        try:
            for file in files:
                setattr(file, _FUNCTION, self._function(entered))
            for layer, divisor in halved:
                vars(layer)["forward"] = _divided(layer, divisor)
            for model in models:
                vars(model)["layers_are_rescaled"] = True
            yield
        finally:
            for file, function in zip(files, functions, strict=True):
                setattr(file, _FUNCTION, function)
            for layer, _ in halved:
                vars(layer).pop("forward", None)
            for model in models:
                vars(model)["layers_are_rescaled"] = False

    @staticmethod
    def _files(module: nn.Module) -> list[ModuleType]:
        names = {type(part).__module__ for part in module.modules() if hasattr(part, "time_decay") and hasattr(part, "time_first")}
        return [file for name in sorted(names) if (file := sys.modules.get(name)) is not None and hasattr(file, _FUNCTION)]

    def _function(self, entered: Entered) -> Callable[..., Any]:
        from ad_core.graph.ops import find_op

        op = find_op(self.produces)

        def function(
            time_decay: torch.Tensor,
            time_first: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            state: Any = None,
            return_state: bool = False,
        ) -> tuple[torch.Tensor, None]:
            if state is not None or return_state:
                raise CaptureError(
                    f"{_FUNCTION} is called with a state of its own",
                    why="a captured sequence starts from zero, and the engine keeps what it leaves",
                    hint="call the model with use_cache=False",
                )
            entered(self.produces)
            return op(key, value, time_decay, time_first).to(key.dtype), None

        return function


def _halved(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The layers whose weights the model is still going to divide, with the divisor."""
    for part in module.modules():
        every = getattr(getattr(part, "config", None), "rescale_every", 0)
        if vars(part).get("layers_are_rescaled") is False and every > 0:
            for number, block in enumerate(cast("Any", part).blocks):
                if number >= every:
                    for layer in (block.attention.output, block.feed_forward.value):
                        yield layer, 2 ** (number // every)


def _divided(layer: nn.Module, divisor: int) -> Callable[..., Any]:
    forward = layer.forward

    def divided(hidden: torch.Tensor) -> torch.Tensor:
        return forward(hidden) / divisor  # type: ignore[no-any-return]

    return divided
