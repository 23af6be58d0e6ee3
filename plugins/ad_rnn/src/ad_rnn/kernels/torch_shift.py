"""Each token's predecessor over states in slots, in plain torch: decodes and prefills alike are three moves of rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ad_core.api import BatchView, BufferSpec, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = "ad_rnn::token_shift_torch(Tensor x, Tensor(a!) state, Tensor counts, Tensor edges, Tensor unwritten) -> Tensor"


def _token_shift(x: torch.Tensor, state: torch.Tensor, counts: torch.Tensor, edges: torch.Tensor, unwritten: torch.Tensor) -> torch.Tensor:
    """The canonical op on packed tokens: x [1, T, D] -> [1, T, D].

    Reads and writes the step's slots of `state` [slots, D]. `counts` (host): sequences with tokens, tokens, whether one starts here.
    `edges` [3, sequences]: first row, last row and slot of each; `unwritten` [sequences, 1]: it starts here, its slot means nothing.
    """
    sequences, tokens, any_fresh = counts.tolist()
    out = x.new_empty(x.shape)
    first, last, slots = edges[:, :sequences]
    before = state.index_select(0, slots)
    if any_fresh:
        before.masked_fill_(unwritten[:sequences], 0)
    out[0, 1:] = x[0, :-1]
    out[0].index_copy_(0, first, before)
    state.index_copy_(0, slots, x[0].index_select(0, last))
    if tokens < x.shape[1]:
        out[0, tokens:].zero_()
    return out


def _fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


token_shift_torch = define_op(SCHEMA, _token_shift, _fake)


class TorchTokenShift(Kernel):
    name = "rnn.token_shift.torch"
    target = "ad_rnn::token_shift"
    op = "ad_rnn::token_shift_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        count = limits.max_sequences
        return {
            "counts": BufferSpec((3,), torch.int64, "host"),
            "edges": BufferSpec((3, count), torch.int64),
            "unwritten": BufferSpec((count, 1), torch.bool),
        }

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        bounds, fresh = batch.host("cu_seqlens"), batch.host("fresh")
        live = (batch.host("query_lens") > 0).nonzero()[:, 0]
        edges = torch.stack([bounds[:-1][live], bounds[1:][live] - 1, batch.host("state_slots")[live]])
        out["counts"][:] = torch.tensor([len(live), int(bounds[-1]), int(fresh[live].any())])
        out["edges"][:, : len(live)].copy_(edges, non_blocking=True)
        out["unwritten"][: len(live), 0].copy_(fresh[live], non_blocking=True)
