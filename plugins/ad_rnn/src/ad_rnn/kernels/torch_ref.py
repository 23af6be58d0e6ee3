"""RG-LRU and WKV over states in slots, in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import plan_buffers, plan_step, put_states, read_plan, take_states
from ad_rnn.rg_lru import scan
from ad_rnn.wkv4 import NO_PEAK, first_state, joined, read, weighted_sums

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
_STATE = "Tensor(a!) state, Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
RG_LRU_SCHEMA = f"ad_rnn::rg_lru_torch(Tensor x, Tensor gate, {_STATE}"
WKV4_SCHEMA = f"ad_rnn::wkv4_torch(Tensor key, Tensor value, Tensor time_decay, Tensor time_first, {_STATE}"


def _rg_lru(
    x: torch.Tensor,
    gate: torch.Tensor,
    state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: x, gate [1, T, D] -> [1, T, D].

    Reads and writes the step's slots of `state` [slots, D]; the last four are `plan_step`'s. Rows past the batch's are zero.
    """
    step, prefills = read_plan(plan, records)
    out, end = x.new_empty(x.shape), step.decodes
    inputs, gates = x[0].to(state.dtype), gate[0].to(state.dtype)
    if end:
        now = take_states(state, step, slots, stale)
        now.mul_(gates[:end]).add_(inputs[:end])
        put_states(state, now, step, slots)
        out[0, :end] = now
    for chunk in prefills:
        end = chunk.token + chunk.size
        rows = slice(chunk.token, end)
        before = torch.zeros_like(state[:1]) if chunk.fresh else state[chunk.slot, None]
        states = scan(inputs[None, rows], gates[None, rows], before)
        state[chunk.slot] = states[0, -1]
        out[0, rows] = states[0]
    if end < x.shape[1]:
        out[0, end:].zero_()
    return out


def _wkv4(
    key: torch.Tensor,
    value: torch.Tensor,
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    state: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: key, value [1, T, D] -> [1, T, D].

    Reads and writes the step's slots of `state` [slots, 3, D]; the last four are `plan_step`'s. Rows past the batch's are zero.
    """
    step, prefills = read_plan(plan, records)
    out, end, dtype = value.new_empty(value.shape), step.decodes, state.dtype
    keys, values = key[0].to(dtype), value[0].to(dtype)
    log_decay, bonus = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    if end:
        now = take_states(state, step, slots, stale)
        if step.any_fresh:
            now[:, 2].masked_fill_(~stale[:end, None], NO_PEAK)
        out[0, :end] = read(now, keys[:end], values[:end], bonus)
        token = torch.stack([values[:end], torch.ones_like(values[:end]), keys[:end]], 1)
        put_states(state, now, step, slots, joined(now, log_decay, token))
    for chunk in prefills:
        end = chunk.token + chunk.size
        k, v = keys[None, chunk.token : end], values[None, chunk.token : end]
        before = first_state(v[:, 0], dtype) if chunk.fresh else state[chunk.slot, None]
        output, after = weighted_sums(k, v, log_decay, bonus, before)
        state[chunk.slot] = after[0]
        out[0, chunk.token : end] = output[0]
    if end < value.shape[1]:
        out[0, end:].zero_()
    return out


def _rg_lru_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


def _wkv4_fake(key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


rg_lru_torch = define_op(RG_LRU_SCHEMA, _rg_lru, _rg_lru_fake)
wkv4_torch = define_op(WKV4_SCHEMA, _wkv4, _wkv4_fake)


class _TorchRecurrence(Kernel):
    """The reference that also has to be fast: `prepare` does whatever does not differ between layers."""

    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)


class TorchRgLru(_TorchRecurrence):
    name = "rnn.rg_lru.torch"
    target = "ad_rnn::rg_lru"
    op = "ad_rnn::rg_lru_torch"


class TorchWkv4(_TorchRecurrence):
    name = "rnn.wkv4.torch"
    target = "ad_rnn::wkv4"
    op = "ad_rnn::wkv4_torch"
