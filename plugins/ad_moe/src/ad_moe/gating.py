"""What stands between an expert's two projections: the activation, and how gate and up meet. A few numbers describe all that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Layout = Literal["none", "concatenated", "interleaved", "separate"]
"""Where the gate is: nowhere; before the up part in one projection; every other column of it, first; a projection of its own."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity")


@dataclass(frozen=True)
class Gating:
    """hidden = min(act(g), limit if `limit_activated`) * (u + `offset`), where g and u were clamped or capped before.

    `limit`: g is at most it, u within plus and minus it; with `limit_activated` it is the activation and not g that is at most it.
    `alpha` scales what the sigmoid of silu sees. `gate_cap`, `up_cap`: the factor x is cap * tanh(x / cap), while
    the sigmoid sees the uncapped gate. Without a gate (`layout` "none") the hidden state is act(projected) alone.
    """

    activation: str = "silu"
    layout: Layout = "concatenated"
    alpha: float = 1.0
    limit: float | None = None
    limit_activated: bool = False
    offset: float = 0.0
    gate_cap: float | None = None
    up_cap: float | None = None

    def __call__(self, projected: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """[N, 2I] (or [N, I], with `gate` [N, I] if it is separate) -> [N, I]. Half precision is computed in float32 and rounded once."""
        dtype = projected.dtype
        if self.plain:
            return self._plain(projected, gate)
        up = projected.to(torch.promote_types(dtype, torch.float32))
        if self.layout == "none":
            return self._activated(up).to(dtype)
        if gate is not None:
            gate = gate.to(up.dtype)
        else:
            gate, up = self.split(up)
        if self.limit is not None:
            gate = gate if self.limit_activated else gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        active = self._activated(gate)
        if self.limit is not None and self.limit_activated:
            active = active.clamp(max=self.limit)
        if self.up_cap is not None:
            up = torch.tanh(up / self.up_cap) * self.up_cap
        return (active * (up + self.offset if self.offset else up)).to(dtype)

    def split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and up, each [N, I], of one projection."""
        if self.layout == "interleaved":
            return projected[..., ::2], projected[..., 1::2]
        gate, up = projected.chunk(2, -1)
        return gate, up

    @property
    def plain(self) -> bool:
        """silu(gate) * up, as most models have it."""
        return self.layout != "none" and self == Gating(layout=self.layout)

    def _plain(self, projected: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """PyTorch's silu computes half precision in float32 as it is; one rounding between it and the product is what models have."""
        up = projected
        if gate is None:
            gate, up = self.split(projected)
        return F.silu(gate).mul_(up)

    def _activated(self, gate: torch.Tensor) -> torch.Tensor:
        match self.activation:
            case "silu":
                capped = gate if self.gate_cap is None else torch.tanh(gate / self.gate_cap) * self.gate_cap
                return capped * torch.sigmoid(gate * self.alpha if self.alpha != 1.0 else gate)
            case "gelu":
                return F.gelu(gate)
            case "gelu_tanh":
                return F.gelu(gate, approximate="tanh")
            case "relu":
                return gate.relu()
            case "relu2":
                return gate.relu().square()
            case "sigmoid":
                return gate.sigmoid()
            case "tanh":
                return gate.tanh()
            case "identity":
                return gate
        raise ValueError(f"there is no activation {self.activation!r}; known are {', '.join(ACTIVATIONS)}")
