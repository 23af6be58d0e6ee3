"""The two recurrences step by step in float64, as the papers write them: what everything else is held against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def ssd_steps(arguments: dict[str, Any], state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, S, H, P] and the last state [B, H, P, N] of `ad_mamba::ssd`."""
    given = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    repeats = x.shape[2] // B.shape[2]
    B, C = (value.repeat_interleave(repeats, 2) for value in (B, C))
    dt = dt + given.get("dt_bias", torch.zeros(x.shape[2], dtype=torch.float64))
    dt = F.softplus(dt) if given.get("dt_softplus") else dt
    dt = dt.clamp(given.get("dt_min", 0.0), given.get("dt_max"))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3]) if state is None else state.double()
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        state = (dt[:, t] * A).exp()[..., None, None] * state
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        out[:, t] = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
    if (D := given.get("D")) is not None:
        out = out + x * (D if D.dim() == 2 else D[:, None])
    return (out * F.silu(given["z"]) if given.get("z") is not None else out), state


def scan_steps(arguments: dict[str, Any], state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, S, D] and the last state [B, D, N] of `ad_mamba::selective_scan`."""
    given = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    u, delta, A, B, C = (given[name] for name in ("u", "delta", "A", "B", "C"))
    delta = delta + given.get("delta_bias", torch.zeros(u.shape[2], dtype=torch.float64))
    delta = F.softplus(delta) if given.get("delta_softplus") else delta
    state = u.new_zeros(u.shape[0], *A.shape) if state is None else state.double()
    out = torch.empty_like(u)
    for t in range(u.shape[1]):
        state = (delta[:, t, :, None] * A).exp() * state + torch.einsum("bd,bd,bn->bdn", delta[:, t], u[:, t], B[:, t])
        out[:, t] = torch.einsum("bdn,bn->bd", state, C[:, t])
    if (D := given.get("D")) is not None:
        out = out + u * D
    return (out * F.silu(given["z"]) if given.get("z") is not None else out), state
