"""Delta rules over states in slots, in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import decoding_states, plan_buffers, plan_step, read_plan
from ad_deltanet.chunked import delta_rule
from ad_deltanet.op import normalised

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
_REST = "Tensor beta, float scale, bool l2norm, Tensor(a!) state, Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
GATED_SCHEMA = f"ad_deltanet::gated_delta_torch(Tensor query, Tensor key, Tensor value, Tensor? g, {_REST}"
KDA_SCHEMA = f"ad_deltanet::kda_torch(Tensor query, Tensor key, Tensor value, Tensor g, {_REST}"


def _gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    l2norm: bool,
    state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: query, key [1, T, H, K], value [1, T, Hv, V], g, beta [1, T, Hv] -> [1, T, Hv, V].

    Reads and writes the step's slots of `state` [slots, Hv, K, V]; the last four are `plan_step`'s. Rows past the batch's are zero.
    """
    return _packed(query, key, value, None if g is None else g[..., None], beta, scale, l2norm, state, plan, records, slots, stale)


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor,
    scale: float,
    l2norm: bool,
    state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The same with g [1, T, Hv, 1] or [1, T, Hv, K]."""
    step, prefills = read_plan(plan, records)
    tokens, heads = value.shape[1:3]
    query, key = normalised(query[0], key[0], heads, scale, l2norm)  # [T, Hv, K]
    dtype = query.dtype
    values, beta = value[0].to(dtype), beta[0].to(dtype)[..., None]
    decay = None if g is None else g[0].to(dtype)
    out, end = value.new_empty(value.shape), step.decodes
    for rows, now in decoding_states(state, step, records, slots, stale):
        part = None if decay is None else decay[rows]
        out[0, rows] = _decode(query[rows], key[rows], values[rows], part, beta[rows], now)
    for chunk in prefills:
        end = chunk.token + chunk.size
        rows = slice(chunk.token, end)
        before = torch.zeros_like(state[0]) if chunk.fresh else state[chunk.slot]
        q, k, v, rate = (x[rows].transpose(0, 1) for x in (query, key, values, beta))
        output, after = delta_rule(q, k, v, None if decay is None else decay[rows].transpose(0, 1), rate, before)
        state[chunk.slot] = after
        out[0, rows] = output.transpose(0, 1)
    if end < tokens:
        out[0, end:].zero_()
    return out


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_decay: torch.Tensor | None, beta: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """One token of each of n sequences: query, key [n, Hv, K], value [n, Hv, V], log_decay [n, Hv, 1 or K], beta [n, Hv, 1]
    -> [n, Hv, V]. Moves `state` [n, Hv, K, V] on in place."""
    batch = value.shape[0] * value.shape[1]
    now = state.view(batch, *state.shape[2:])
    if log_decay is not None:
        now.mul_(log_decay.exp().reshape(batch, -1, 1))
    rows = key.reshape(batch, 1, -1)
    known = torch.bmm(rows, now).view(value.shape)
    now.baddbmm_(rows.transpose(1, 2), ((value - known) * beta).reshape(batch, 1, -1))
    return torch.bmm(query.reshape(batch, 1, -1), now).view(value.shape)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


gated_delta_torch = define_op(GATED_SCHEMA, _gated_delta, _fake)
kda_torch = define_op(KDA_SCHEMA, _packed, _fake)


class _TorchDelta(Kernel):
    """The reference that also has to be fast: `prepare` does whatever does not differ between layers."""

    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)


class TorchGatedDelta(_TorchDelta):
    name = "deltanet.gated_delta.torch"
    target = "ad_deltanet::gated_delta"
    op = "ad_deltanet::gated_delta_torch"


class TorchKda(_TorchDelta):
    name = "deltanet.kda.torch"
    target = "ad_deltanet::kda"
    op = "ad_deltanet::kda_torch"
