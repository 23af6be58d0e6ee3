"""The selective scan (Gu and Dao, 2023, "Mamba: Linear-Time Sequence Modeling"), the recurrence of Mamba-1, over one whole sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ad_core.api import Role
from ad_core.graph.ops import define_op
from ad_mamba.op.common import blocks, time_steps

OP = "ad_mamba::selective_scan"
SCHEMA = (
    f"{OP}(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, *, Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, "
    "bool delta_softplus=False) -> Tensor"
)
ROLES = {
    "u": Role.TOKEN,
    "delta": Role.TOKEN,
    "A": Role.PARAM,
    "B": Role.TOKEN,
    "C": Role.TOKEN,
    "D": Role.PARAM,
    "z": Role.TOKEN,
    "delta_bias": Role.PARAM,
    "delta_softplus": Role.CONST,
}
CHUNK = 16
"""Steps that are taken one after the other, in all chunks of a block at once."""
BLOCK = 256
"""Tokens whose states are in memory at once."""


def selective_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """s_t = exp(d_t A) s_(t-1) + d_t u_t (x) B_t;  y_t = (s_t C_t + D u_t) silu(z_t);  s_0 = 0.

    u, delta and z [B, S, D], A [D, N], B and C [B, S, N], D [D] -> [B, S, D], contiguous, of u's dtype. d is `delta` +
    `delta_bias` [D], its softplus if `delta_softplus`. Half precision is computed in float32 and rounded once.
    """
    steps = time_steps(delta, delta_bias, delta_softplus)
    return gated(chunked(u, steps, A, B, C, steps.new_zeros(u.shape[0], *A.shape))[0], u, D, z)


def chunked(
    u: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s C of the tokens that follow `state` [B, D, N], and the state after them. Writes to none of its arguments.

    `steps` [B, S, D] are the final d, in the wide dtype, and so is the result [B, S, D].
    """
    dtype, parts = steps.dtype, []
    for rows in blocks(u.shape[1], BLOCK):
        part, state = _block(u[:, rows].to(dtype), steps[:, rows], A.to(dtype), B[:, rows].to(dtype), C[:, rows].to(dtype), state)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), state


def _block(
    u: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every chunk from a zero state, step by step in all chunks at once; then from chunk to chunk; then what each chunk was given.

    Products of decays are formed forwards only: each factor is at most one where A is negative, so nothing overflows. Steps of
    zero fill the last chunk: they neither add to the state nor let it decay.
    """
    batch, length, channels = u.shape
    chunk = min(CHUNK, length)
    count = -(-length // chunk)
    if missing := count * chunk - length:
        u, steps, B, C = (F.pad(value, (0, 0, 0, missing)) for value in (u, steps, B, C))
    u, steps, B, C = (value.unflatten(1, (count, chunk)) for value in (u, steps, B, C))
    decay = (steps[..., None] * A).exp_()  # [B, chunks, L, D, N]
    states = (steps * u)[..., None] * B[:, :, :, None]
    for index in range(1, chunk):
        states[:, :, index].addcmul_(decay[:, :, index], states[:, :, index - 1])
        decay[:, :, index].mul_(decay[:, :, index - 1])
    before = []
    for index in range(count):
        before.append(state)
        state = torch.addcmul(states[:, index, -1], decay[:, index, -1], state)
    states.addcmul_(decay, torch.stack(before, 1)[:, :, None])
    out = (states @ C[..., None]).squeeze(-1)  # [B, chunks, L, D]
    return out.view(batch, count * chunk, channels)[:, :length], state


def gated(out: torch.Tensor, u: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(out + D u) silu(z), rounded to u's dtype. Overwrites `out` [..., D], which is wide."""
    if D is not None:
        out = out.addcmul_(u.to(out.dtype), D.to(out.dtype))
    if z is not None:
        out = out.mul_(F.silu(z.to(out.dtype)))
    return out.to(u.dtype).contiguous()


def selective_scan_fake(u: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, D], contiguous, of u's dtype."""
    return u.new_empty(u.shape)


selective_scan = define_op(SCHEMA, selective_scan_reference, selective_scan_fake)
