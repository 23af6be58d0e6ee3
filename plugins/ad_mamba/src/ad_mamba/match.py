"""The functions that transformers marks in the file of every Mamba model: `selective_scan_fn` and `mamba_chunk_scan_combined`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ad_core.api.errors import CaptureError
from ad_core.graph.seams import Entered, MarkedFunctionSeam
from ad_mamba.op import scan, ssd


class SelectiveScanSeam(MarkedFunctionSeam):
    """Mamba-1: u, delta and z are [B, D, S] there, B and C [B, N, S], and so is what comes back."""

    name = "mamba.selective_scan_fn"
    mark = "selective_scan_fn"
    produces = scan.OP

    def replacement(self, original: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
        def marked(
            u: torch.Tensor,
            delta: torch.Tensor,
            A: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            D: torch.Tensor | None = None,
            z: torch.Tensor | None = None,
            delta_bias: torch.Tensor | None = None,
            delta_softplus: bool = False,
            return_last_state: bool = False,
            **_: Any,  # which of its own implementations the author prefers
        ) -> torch.Tensor:
            _stateless(self.mark, return_last_state=return_last_state)
            if B.dim() != 3 or C.dim() != 3:
                raise CaptureError("selective_scan_fn is called with B or C that do not depend on the token, or in groups")
            entered(self.produces)
            sequence = [value.transpose(1, 2) for value in (u, delta, B, C)]
            return scan.selective_scan(
                *sequence[:2],
                A,
                *sequence[2:],
                D=D,
                z=None if z is None else z.transpose(1, 2),
                delta_bias=delta_bias,
                delta_softplus=delta_softplus,
            ).transpose(1, 2)

        return marked


class ChunkScanSeam(MarkedFunctionSeam):
    """Mamba-2: the layouts are the canonical op's own."""

    name = "mamba.chunk_scan_combined"
    mark = "mamba_chunk_scan_combined"
    produces = ssd.OP

    def replacement(self, original: Callable[..., Any], entered: Entered) -> Callable[..., Any]:
        def marked(
            x: torch.Tensor,
            dt: torch.Tensor,
            A: torch.Tensor,
            B: torch.Tensor,
            C: torch.Tensor,
            chunk_size: int = 0,  # how to compute it, not what
            D: torch.Tensor | None = None,
            z: torch.Tensor | None = None,
            dt_bias: torch.Tensor | None = None,
            initial_states: torch.Tensor | None = None,
            seq_idx: torch.Tensor | None = None,
            dt_softplus: bool = False,
            dt_limit: tuple[float, float] = (0.0, math.inf),
            return_final_states: bool = False,
            **_: Any,
        ) -> torch.Tensor:
            _stateless(self.mark, initial_states=initial_states, seq_idx=seq_idx, return_final_states=return_final_states or None)
            low, high = dt_limit
            entered(self.produces)
            return ssd.ssd(
                x,
                dt,
                A,
                B,
                C,
                D=D,
                z=z,
                dt_bias=dt_bias,
                dt_softplus=dt_softplus,
                dt_min=float(low),
                dt_max=None if math.isinf(high) else float(high),
            )

        return marked


def _stateless(function: str, **given: Any) -> None:
    """Raises `CaptureError` if the call hands states over or asks for them."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise CaptureError(
                f"{function} is called with {name}",
                why="the canonical op starts at the first token of each row from a zero state and gives no state back",
                hint="export the model without a cache",
            )
