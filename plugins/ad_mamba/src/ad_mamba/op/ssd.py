"""Structured state space duality (Dao and Gu, 2024, "Transformers are SSMs"), the recurrence of Mamba-2, over one whole sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ad_core.api import Role
from ad_core.graph.ops import define_op
from ad_mamba.op.common import blocks, time_steps

OP = "ad_mamba::ssd"
SCHEMA = (
    f"{OP}(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, *, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
    "bool dt_softplus=False, float dt_min=0.0, float? dt_max=None) -> Tensor"
)
ROLES = {
    "x": Role.TOKEN,
    "dt": Role.TOKEN,
    "A": Role.PARAM,
    "B": Role.TOKEN,
    "C": Role.TOKEN,
    "D": Role.PARAM,
    "z": Role.TOKEN,
    "dt_bias": Role.PARAM,
    "dt_softplus": Role.CONST,
    "dt_min": Role.CONST,
    "dt_max": Role.CONST,
}
CHUNK = 64
"""Tokens that meet each other in one matrix; between chunks only the state goes on."""
BLOCK = 512
"""Tokens whose matrices are in memory at once."""


def ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> torch.Tensor:
    """s_t = exp(d_t A) s_(t-1) + d_t x_t (x) B_t;  y_t = (s_t C_t + D x_t) silu(z_t);  s_0 = 0.

    x [B, S, H, P], dt [B, S, H], A [H], B and C [B, S, G, N], D [H] or [H, P], z like x -> [B, S, H, P], contiguous, of x's
    dtype. Head h reads group h // (H / G) of B and C. d is `dt` + `dt_bias` [H], its softplus if `dt_softplus`, cut to
    `dt_min` .. `dt_max`. Half precision is computed in float32 and rounded once.
    """
    steps = time_steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    batch, _, heads, width = x.shape
    state = steps.new_zeros(batch, heads, width, B.shape[3])
    return gated(chunked(x, steps, A, B, C, state)[0], x, D, z)


def chunked(
    x: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s C of the tokens that follow `state` [B, H, P, N], and the state after them. Writes to none of its arguments.

    `steps` [B, S, H] are the final d, in the wide dtype, and so is the result [B, S, H, P].
    """
    dtype, parts = steps.dtype, []
    for rows in blocks(x.shape[1], BLOCK):
        part, state = _block(x[:, rows].to(dtype), steps[:, rows], A.to(dtype), B[:, rows].to(dtype), C[:, rows].to(dtype), state)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), state


def _block(
    x: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block, all its chunks at once. Steps of zero fill the last chunk: they neither add to the state nor let it decay."""
    batch, length, heads, width = x.shape
    groups, size = B.shape[2:]
    chunk = min(CHUNK, length)
    count = -(-length // chunk)
    if missing := count * chunk - length:
        x, B, C = (F.pad(value, (0, 0, 0, 0, 0, missing)) for value in (x, B, C))
        steps = F.pad(steps, (0, 0, 0, missing))

    def by_chunk(value: torch.Tensor) -> torch.Tensor:  # [B, S, H, ...] -> [B, chunks, H, L, ...]
        return value.unflatten(1, (count, chunk)).transpose(2, 3)

    decay = by_chunk(steps * A).cumsum(-1)  # [B, chunks, H, L]: logarithm of the decay since the chunk began
    values = by_chunk(x * steps[..., None])  # [B, chunks, H, L, P]
    keys, queries = by_chunk(B), by_chunk(C)  # [B, chunks, G, L, N]

    # Within a chunk: token j reaches token i >= j by C_i . B_j, decayed from j to i.
    later = torch.full((chunk, chunk), -torch.inf, dtype=steps.dtype, device=x.device).triu_(1)
    weights = (decay[..., :, None] - decay[..., None, :]).add_(later).exp_()  # [B, chunks, H, L, L]
    scores = queries @ keys.transpose(-1, -2)  # [B, chunks, G, L, L]
    weights.unflatten(2, (groups, -1)).mul_(scores[:, :, :, None])
    out = weights @ values  # [B, chunks, H, L, P]

    # What each chunk adds to the state, and the state before each chunk.
    left = (decay[..., -1:] - decay).exp_()
    added = (values * left[..., None]).transpose(-1, -2).reshape(batch, count, groups, -1, chunk) @ keys
    added = added.view(batch, count, heads, width, size)
    kept = decay[..., -1].exp()[..., None, None]  # [B, chunks, H, 1, 1]
    before = []
    for index in range(count):
        before.append(state)
        state = torch.addcmul(added[:, index], state, kept[:, index])
    carried = torch.stack(before, 1).view(batch, count, groups, -1, size)  # [B, chunks, G, H/G * P, N]

    # What a chunk's tokens read of the state before it.
    read = (queries @ carried.transpose(-1, -2)).unflatten(-1, (-1, width))  # [B, chunks, G, L, H/G, P]
    out.addcmul_(read.transpose(3, 4).reshape(out.shape), decay.exp_()[..., None])
    return out.transpose(2, 3).reshape(batch, count * chunk, heads, width)[:, :length], state


def gated(out: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    """(out + D x) silu(z), rounded to x's dtype. Overwrites `out` [..., H, P], which is wide."""
    if D is not None:
        out = out.addcmul_(x.to(out.dtype), (D if D.dim() == 2 else D[:, None]).to(out.dtype))
    if z is not None:
        out = out.mul_(F.silu(z.to(out.dtype)))
    return out.to(x.dtype).contiguous()


def ssd_fake(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """[B, S, H, P], contiguous, of x's dtype."""
    return x.new_empty(x.shape)


ssd = define_op(SCHEMA, ssd_reference, ssd_fake)
