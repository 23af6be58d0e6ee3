"""The selective scan over slots in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import plan_buffers, plan_step, put_states, read_plan, take_states
from ad_mamba.op.common import time_steps
from ad_mamba.op.scan import OP, chunked, gated

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_mamba::selective_scan_torch(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor(a!) ssm_state, Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
)


def _selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    delta_bias: torch.Tensor | None,
    delta_softplus: bool,
    ssm_state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: u [1, T, D] -> [1, T, D].

    Reads and writes the states [slots, D, N] of the step's sequences; the last four arguments are `plan_step`'s. Rows past the
    batch's tokens are zero.
    """
    (step, chunks), T = read_plan(plan, records), u.shape[1]
    for chunk in chunks:
        if chunk.fresh:
            ssm_state[chunk.slot].zero_()
    steps = time_steps(delta, delta_bias, delta_softplus)
    if step.decodes == T:  # a step of decodes and nothing else: its result is the output
        state = take_states(ssm_state, step, slots, stale)
        decoded = _decode(u[0], steps[0], A, B[0], C[0], state)
        put_states(ssm_state, state, step, slots)
        return gated(decoded[None], u, D, z)
    if len(chunks) == 1 and chunks[0].size == T:  # the step of one prompt: likewise
        return gated(_prefill(u, steps, A, B, C, ssm_state[chunks[0].slot]), u, D, z)
    out = steps.new_empty(u.shape)
    if step.decodes:
        rows = slice(0, step.decodes)
        state = take_states(ssm_state, step, slots, stale)
        out[0, rows] = _decode(u[0, rows], steps[0, rows], A, B[0, rows], C[0, rows], state)
        put_states(ssm_state, state, step, slots)
    for chunk in chunks:
        rows = slice(chunk.token, chunk.token + chunk.size)
        out[:, rows] = _prefill(u[:, rows], steps[:, rows], A, B[:, rows], C[:, rows], ssm_state[chunk.slot])
    result = gated(out, u, D, z)
    result[0, step.tokens :].zero_()
    return result


def _decode(u: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token of n sequences: u and steps [n, D], B and C [n, N] -> [n, D], wide. Moves their states [n, D, N] on."""
    state.mul_((steps[..., None] * A).exp_()).addcmul_((steps * u)[..., None], B.to(steps.dtype)[:, None])
    return (state @ C.to(steps.dtype)[..., None]).squeeze(-1)


def _prefill(u: torch.Tensor, steps: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The next tokens of one sequence: u [1, m, D] -> [1, m, D], wide. Moves its state [D, N] on."""
    out, after = chunked(u, steps, A, B, C, state[None])
    state.copy_(after[0])
    return out


def _fake(u: torch.Tensor, *_: object) -> torch.Tensor:
    return u.new_empty(u.shape)


selective_scan_torch = define_op(SCHEMA, _selective_scan, _fake)


class TorchScan(Kernel):
    """The reference that also has to be fast: decodes of all sequences are one update, prefills go chunk by chunk."""

    name = "mamba.scan.torch"
    target = OP
    op = "ad_mamba::selective_scan_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)
