"""SSD over slots in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import plan_buffers, plan_step, put_states, read_plan, take_states
from ad_mamba.op.common import time_steps
from ad_mamba.op.ssd import OP, chunked, gated

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_mamba::ssd_torch(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float dt_min, float? dt_max, Tensor(a!) ssm_state, Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
)


def _ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    ssm_state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, H, P] -> [1, T, H, P].

    Reads and writes the states [slots, H, P, N] of the step's sequences; the last four arguments are `plan_step`'s. Rows past the
    batch's tokens are zero.
    """
    (step, chunks), T = read_plan(plan, records), x.shape[1]
    steps = time_steps(dt, dt_bias, dt_softplus, dt_min, dt_max)
    for chunk in chunks:
        if chunk.fresh:
            ssm_state[chunk.slot].zero_()
    if len(chunks) == 1 and chunks[0].size == T:  # one prompt and nothing else: its result is the output
        return gated(_prefill(x, steps, A, B, C, ssm_state[chunks[0].slot]), x, D, z)
    parts = []
    if step.decodes:
        rows = slice(0, step.decodes)
        state = take_states(ssm_state, step, slots, stale)
        parts.append(_decode(x[0, rows], steps[0, rows], A, B[0, rows], C[0, rows], state)[None])
        put_states(ssm_state, state, step, slots)
    for chunk in chunks:
        rows = slice(chunk.token, chunk.token + chunk.size)
        parts.append(_prefill(x[:, rows], steps[:, rows], A, B[:, rows], C[:, rows], ssm_state[chunk.slot]))
    if step.tokens < T:
        parts.append(steps.new_empty(1, T - step.tokens, *x.shape[2:]))
    result = gated(parts[0] if len(parts) == 1 else torch.cat(parts, 1), x, D, z)
    if step.tokens < T:
        result[0, step.tokens :].zero_()
    return result


def _decode(x: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token of n sequences: x [n, H, P], steps [n, H], B and C [n, G, N] -> [n, H, P], wide. Moves their states [n, H, P, N] on."""
    count, heads, width = x.shape
    groups, size, dtype = B.shape[1], B.shape[2], steps.dtype
    state.mul_((steps * A).exp_()[..., None, None])
    added = (x * steps[..., None]).reshape(count, groups, -1, 1)
    by_group = state.view(count, groups, -1, size)  # [n, G, H/G * P, N]
    by_group.addcmul_(added, B.to(dtype)[:, :, None])
    return (by_group @ C.to(dtype)[..., None]).view(count, heads, width)


def _prefill(x: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The next tokens of one sequence: x [1, m, H, P] -> [1, m, H, P], wide. Moves its state [H, P, N] on."""
    out, after = chunked(x, steps, A, B, C, state[None])
    state.copy_(after[0])
    return out


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


ssd_torch = define_op(SCHEMA, _ssd, _fake)


class TorchSSD(Kernel):
    """The reference that also has to be fast: decodes of all sequences are one update, prefills are matrix products."""

    name = "mamba.ssd.torch"
    target = OP
    op = "ad_mamba::ssd_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)
