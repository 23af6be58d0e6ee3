"""Linear attention with a fixed decay over states in slots, in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import decoding_states, plan_buffers, plan_step, read_plan
from ad_linear.lightning import decayed_attention

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_linear::lightning_torch(Tensor query, Tensor key, Tensor value, Tensor log_decay, float scale, Tensor(a!) state, "
    "Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
)


def _lightning(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    scale: float,
    state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: query, key [1, T, H, K], value [1, T, H, V] -> [1, T, H, V].

    Reads and writes the step's slots of `state` [slots, H, K, V]; the last four are `plan_step`'s. Rows past the batch's are zero.
    """
    step, prefills = read_plan(plan, records)
    out, dtype = value.new_empty(value.shape), state.dtype
    queries, keys, values = (x[0].to(dtype) for x in (query, key, value))  # [T, H, ...]
    log_decay = log_decay.to(dtype)
    end = step.decodes
    for rows, chosen in decoding_states(state, step, records, slots, stale):
        now = chosen.view(-1, *state.shape[2:])  # [n * H, K, V]
        chosen.mul_(log_decay.exp()[:, None, None])
        now.baddbmm_(keys[rows].reshape(len(now), -1, 1), values[rows].reshape(len(now), 1, -1))
        out[0, rows] = torch.bmm((queries[rows] * scale).reshape(len(now), 1, -1), now).view(-1, *value.shape[2:])
    for chunk in prefills:
        end = chunk.token + chunk.size
        rows = slice(chunk.token, end)
        before = torch.zeros_like(state[0]) if chunk.fresh else state[chunk.slot]
        q, k, v = (x[rows].transpose(0, 1)[None] for x in (queries, keys, values))
        output, after = decayed_attention(q * scale, k, v, log_decay, before[None])
        state[chunk.slot] = after[0]
        out[0, rows] = output[0].transpose(0, 1)
    if end < value.shape[1]:
        out[0, end:].zero_()
    return out


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


lightning_torch = define_op(SCHEMA, _lightning, _fake)


class TorchLightning(Kernel):
    """The reference that also has to be fast: `prepare` does whatever does not differ between layers."""

    name = "linear.lightning.torch"
    target = "ad_linear::lightning"
    op = "ad_linear::lightning_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)
