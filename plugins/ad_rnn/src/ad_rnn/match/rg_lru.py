"""The seam of RG-LRU layers: the method that runs their recurrence, a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ad_core.api import Declined, Seam
from ad_core.api.errors import CaptureError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ad_core.graph.seams import Entered


class RgLruScan(Seam):
    """Only the recurrence is swapped: the gates before it look at one token alone, and stay in the graph as they are written."""

    name = "rnn.rg_lru_scan"
    produces = "ad_rnn::rg_lru"

    def applies(self, module: nn.Module) -> Declined | None:
        return None if self._parts(module) else Declined(f"{type(module).__name__} has no RG-LRU layer")

    @contextmanager
    def open(self, module: nn.Module, entered: Entered) -> Iterator[None]:
        parts = self._parts(module)
        before = [dict(vars(part)) for part in parts]
        try:
            for part in parts:
                vars(part)["_rnn_scan"] = self._scan(part, entered)
            yield
        finally:  # the layer also leaves its last state in itself
            for part, attributes in zip(parts, before, strict=True):
                vars(part).clear()
                vars(part).update(attributes)

    @staticmethod
    def _parts(module: nn.Module) -> list[nn.Module]:
        return [part for part in module.modules() if hasattr(type(part), "_rnn_scan") and hasattr(part, "recurrent_gate_weight")]

    def _scan(self, part: nn.Module, entered: Entered) -> Callable[..., Any]:
        from ad_core.graph.ops import find_op

        op = find_op(self.produces)

        def scan(
            hidden_states: torch.Tensor,
            recurrent_gate: torch.Tensor,
            reset: torch.Tensor,
            recurrent_states: torch.Tensor | None,
            acc_dtype: torch.dtype | None = None,
        ) -> tuple[torch.Tensor, None]:
            if recurrent_states is not None:
                raise CaptureError(
                    f"{type(part).__name__} goes on from a state of its own",
                    why="a captured sequence starts from zero, and the engine keeps what it leaves",
                    hint="call the model with use_cache=False",
                )
            entered(self.produces)
            return op(hidden_states, recurrent_gate * ~reset), None

        return scan
