"""mLSTM over memories in slots, in plain torch: any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.kernels.slots import decoding_states, plan_buffers, plan_step, put_states, read_plan, take_states
from ad_linear.mlstm import matrix_memory

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_linear::mlstm_torch(Tensor query, Tensor key, Tensor value, Tensor input_gate, Tensor forget_gate, float scale, float eps, "
    "Tensor(a!) memory, Tensor(b!) peak, Tensor plan, Tensor records, Tensor slots, Tensor stale) -> Tensor"
)


def _mlstm(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    input_gate: torch.Tensor,
    forget_gate: torch.Tensor,
    scale: float,
    eps: float,
    memory: torch.Tensor,
    peak: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    slots: torch.Tensor,
    stale: torch.Tensor,
) -> torch.Tensor:
    """The canonical op on packed tokens: query, key [1, T, H, K], value [1, T, H, V], gates [1, T, H] -> [1, T, H, V].

    Reads and writes the step's slots of `memory` [slots, H, K, V + 1] and `peak` [slots, H]; the last four are `plan_step`'s.
    Rows past the batch's are zero.
    """
    step, prefills = read_plan(plan, records)
    out, dtype = value.new_empty(value.shape), memory.dtype
    queries, keys, values, gates = (x[0].to(dtype) for x in (query, key, value, input_gate))  # [T, H, ...]
    forget = F.logsigmoid(forget_gate[0].to(dtype))
    end, heads = step.decodes, value.shape[2]
    if end:
        old = take_states(peak, step, slots, stale)
        kept = forget[:end] + old
        new = torch.maximum(kept, gates[:end])  # [n, H]
        forgetting, writing = torch.exp(kept - new), torch.exp(gates[:end] - new)
        put_states(peak, old, step, slots, new)
        columns, values_and_one = keys[:end] * writing[..., None], F.pad(values[:end], (0, 1), value=1.0)
        for rows, chosen in decoding_states(memory, step, records, slots, stale):
            now = chosen.view(-1, *memory.shape[2:])  # [n * H, K, V + 1]
            chosen.mul_(forgetting[rows, :, None, None])
            now.baddbmm_(columns[rows].reshape(len(now), -1, 1), values_and_one[rows].reshape(len(now), 1, -1))
            read = torch.bmm((queries[rows] * scale).reshape(len(now), 1, -1), now).view(-1, heads, now.shape[2])
            bound = torch.maximum(read[..., -1].abs(), torch.exp(-new[rows])) + eps
            out[0, rows] = read[..., :-1] / bound[..., None]
    for chunk in prefills:
        end = chunk.token + chunk.size
        rows = slice(chunk.token, end)
        before, old = (torch.zeros_like(pool[:1]) if chunk.fresh else pool[chunk.slot, None] for pool in (memory, peak))
        q, k, v, gate, log_forget = (x[rows].transpose(0, 1)[None] for x in (queries, keys, values, gates, forget))
        output, after, new = matrix_memory(q * scale, k, v, gate, log_forget, before, old, eps)
        memory[chunk.slot], peak[chunk.slot] = after[0], new[0]
        out[0, rows] = output[0].transpose(0, 1)
    if end < value.shape[1]:
        out[0, end:].zero_()
    return out


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return value.new_empty(value.shape)


mlstm_torch = define_op(SCHEMA, _mlstm, _fake)


class TorchMLstm(Kernel):
    """The reference that also has to be fast: `prepare` does whatever does not differ between layers."""

    name = "linear.mlstm.torch"
    target = "ad_linear::mlstm"
    op = "ad_linear::mlstm_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        return plan_buffers(limits)

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, out)
