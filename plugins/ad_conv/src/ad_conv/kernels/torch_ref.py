"""The causal convolution over slots in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_conv.op import ACTIVATIONS, OP, filtered
from ad_core.api import BatchView, BufferSpec, Declined, Environment, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import Chunk, Step, plan_buffers, plan_step, put_states, read_plan, take_states

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_conv::causal_conv1d_torch(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor(a!)? conv_state, Tensor plan, "
    "Tensor records, Tensor slots, Tensor stale) -> Tensor"
)


def _causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    conv_state: torch.Tensor | None,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, C] -> [1, T, C].

    Reads and writes the states [slots, K - 1, C] of the step's sequences; None if K is 1. The last four arguments are `plan_step`'s.
    Rows past the batch's tokens are zero.
    """
    (step, chunks), T = read_plan(plan, records), x.shape[1]
    if conv_state is None:  # one tap sees no other token
        alone = filtered(x, weight, bias, activation)
        alone[0, step.tokens :].zero_()
        return alone
    if not step.decodes:
        return prompts(step, chunks, x, weight, bias, activation, conv_state)
    before = take_states(conv_state, step, slots, stale)
    window = torch.cat([before, x[0, : step.decodes, None]], 1)  # [n, K, C]
    put_states(conv_state, before, step, slots, window[:, 1:])
    decoded = filtered(window, weight, bias, activation)[:, 0][None]
    if step.decodes == T:  # a step of decodes and nothing else: its result is the output
        return decoded
    return torch.cat([decoded, prompts(step, chunks, x, weight, bias, activation, conv_state)], 1)


def prompts(
    step: Step,
    chunks: list[Chunk],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    conv_state: torch.Tensor,
) -> torch.Tensor:
    """The rows behind the decodes: chunks of prompts, and padding, which is zero. [1, T - decodes, C]"""
    for chunk in chunks:
        if chunk.fresh:
            conv_state[chunk.slot].zero_()
    rest = x[0, step.decodes :]
    if len(chunks) == 1 and chunks[0].size == rest.shape[0]:  # one prompt and nothing else: its result is the output
        return _prefill(rest, weight, bias, activation, conv_state[chunks[0].slot])[None]
    out = rest.new_empty(rest.shape)
    for chunk in chunks:
        rows = slice(chunk.token - step.decodes, chunk.token - step.decodes + chunk.size)
        out[rows] = _prefill(rest[rows], weight, bias, activation, conv_state[chunk.slot])
    out[step.tokens - step.decodes :].zero_()
    return out[None]


def _prefill(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str, state: torch.Tensor) -> torch.Tensor:
    """The next tokens of one sequence: x [m, C] -> [m, C]. Moves its state [K - 1, C] on."""
    window = torch.cat([state, x])
    state.copy_(window[x.shape[0] :])
    return filtered(window, weight, bias, activation)


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


causal_conv1d_torch = define_op(SCHEMA, _causal_conv1d, _fake)


class TorchSlots(Kernel):
    """The reference that also has to be fast: decodes of all sequences are one update."""

    name = "conv.causal.torch"
    target = OP
    op = "ad_conv::causal_conv1d_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if call["activation"] not in ACTIVATIONS:
            return Declined(f"it has no activation {call['activation']!r}")
        return None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)
