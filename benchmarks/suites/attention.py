"""Paged attention on a GPU: our Triton kernels against float64 first, then against the clock, the memory and dense SDPA."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ad_attention.kernels.triton_paged import TritonPaged, attention_triton
from ad_core.api import Limits, OpCall

TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-4}
"""Of the largest output of float64."""
L2_BUSTER = 256 * 2**20
"""Bytes of pools to go round, several times a second-level cache: a model's layers never find their own there either."""


@dataclass(frozen=True)
class Case:
    """`rows` are (tokens cached, tokens new) a sequence."""

    name: str
    rows: tuple[tuple[int, int], ...]
    H: int = 32
    G: int = 8
    D: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        shape = {"H": self.H, "G": self.G, "D": self.D, "page_size": self.page_size, "dtype": str(self.dtype).removeprefix("torch.")}
        return {"name": self.name, "sequences": len(self.rows), "tokens": sum(new for _, new in self.rows)} | shape | self.options


CASES = (
    *(Case(f"decode b{b} ctx{n}", ((n - 1, 1),) * b) for b, n in ((1, 128), (1, 1024), (1, 8192), (1, 131072))),
    *(Case(f"decode b{b} ctx{n}", ((n - 1, 1),) * b) for b, n in ((64, 128), (64, 1024), (64, 4096))),
    Case("decode b64 ragged", tuple((17 + 61 * i, 1) for i in range(64))),
    Case("decode b16 ctx4096 window128 d64", ((4095, 1),) * 16, H=64, D=64, options={"window": 128}),
    Case("decode b64 ctx1024 page1", ((1023, 1),) * 64, page_size=1),
    *(Case(f"prefill {n}", ((0, n),)) for n in (512, 4096)),
    Case("prefill 4096 mha d64", ((0, 4096),), H=16, G=16, D=64),
    Case("chunk 512 at 8192", ((8192, 512),)),
    Case("mixed 32 decodes and a chunk of 480", (*((1023, 1),) * 32, (1024, 480))),
)


class Work:
    """One step of a case in `copies` sets of pools. Everything lies where it is used; building it is not timed."""

    def __init__(self, case: Case, device: str, copies: int | None = None):
        self.case = case
        draw = torch.Generator().manual_seed(0)
        totals = [context + new for context, new in case.rows]
        pages = [-(-total // case.page_size) for total in totals]
        B, T = len(case.rows), sum(new for _, new in case.rows)
        table = torch.zeros(B, max(pages), dtype=torch.int32)
        order = (torch.randperm(sum(pages), generator=draw) + 1).int()
        for b, part in enumerate(order.split(pages)):
            table[b, : pages[b]] = part
        size = case.page_size
        every = [table[b].long().repeat_interleave(size)[:n] * size + torch.arange(n) % size for b, n in enumerate(totals)]
        self.slots = [slots.to(device) for slots in every]  # of every token of a sequence, cached or new
        token_slots = torch.cat([slots[context:] for slots, (context, _) in zip(every, case.rows, strict=True)]).int()
        new = torch.tensor([new for _, new in case.rows])
        self.fields = {
            "cu_seqlens": F.pad(new.cumsum(0), (1, 0)).int().to(device),
            "context_lens": torch.tensor([context for context, _ in case.rows], dtype=torch.int32, device=device),
            "page_table": table.to(device),
            "token_slots": token_slots.to(device),
        }
        self.pool_bytes = (sum(pages) + 1) * size * 2 * case.G * case.D * case.dtype.itemsize
        self.copies = copies or max(2, math.ceil(L2_BUSTER / self.pool_bytes))
        made = {"dtype": case.dtype, "device": device}
        shape = (sum(pages) + 1, size, case.G, case.D)
        self.pools = [{name: torch.randn(shape, **made) for name in ("key_pages", "value_pages")} for _ in range(self.copies)]
        self.tokens = [torch.randn(1, T, heads, case.D, **made) for heads in (case.H, case.G, case.G)]
        self.scale = case.D**-0.5
        self.buffers = self._buffers(device, max(totals), B, T)

    def _buffers(self, device: str, longest: int, sequences: int, tokens: int) -> dict[str, torch.Tensor]:
        absent = dict.fromkeys(("window", "chunk", "rel_bias")) | {"rel_bias_rule": ""}
        arguments = dict(zip(("query", "key", "value"), self.tokens, strict=True)) | absent | self.case.options
        specs = TritonPaged().buffers(
            OpCall("", "", TritonPaged.target, arguments), Limits(tokens, sequences, longest, self.case.page_size)
        )
        return {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs.items()}

    def run(self, copy: int) -> torch.Tensor:
        """One step on one set of pools, [1, T, H, D]."""
        optional = dict.fromkeys(("key_bias_pages", "partial_output", "partial_lse", "distance_buckets"))
        named = optional | self.pools[copy] | self.fields | self.buffers | self.case.options
        return attention_triton(*self.tokens, append=True, scale=self.scale, **named)

    def sequences(self, copy: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(query [new, H, D], key and value [context + new, G, D]) of every sequence, after a run."""
        queries = self.tokens[0][0].split([new for _, new in self.case.rows])
        for query, slots in zip(queries, self.slots, strict=True):
            yield query, *(self.pools[copy][name].flatten(0, 1)[slots] for name in ("key_pages", "value_pages"))

    def error(self, copy: int) -> float:
        """The largest difference to float64, relative to the largest output; infinite if the output holds NaN."""
        got = self.run(copy)[0].double()
        expected = torch.cat([exact(*sequence, self.scale, **self.case.options) for sequence in self.sequences(copy)])
        error = float((got - expected).abs().max() / expected.abs().max())
        return error if math.isfinite(error) else math.inf

    @property
    def bytes(self) -> int:
        """What must cross the memory's pins: keys and values that are seen, the step's own tensors."""
        window = self.case.options.get("window")
        seen = sum(context + new if window is None else min(context + new, window + new - 1) for context, new in self.case.rows)
        tokens = sum(tensor.numel() for tensor in self.tokens) + self.tokens[0].numel()
        return (2 * seen * self.case.G * self.case.D + tokens) * self.case.dtype.itemsize

    @property
    def flops(self) -> int:
        window = self.case.options.get("window") or math.inf
        pairs = sum(min(context + i + 1, window) for context, new in self.case.rows for i in range(new))
        return int(4 * pairs * self.case.H * self.case.D)


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None) -> torch.Tensor:
    """Causal attention in float64, a head at a time: the queries are the last tokens. [new, H, D]."""
    new, total = len(query), len(key)
    i = torch.arange(total - new, total, device=query.device)[:, None]
    j = torch.arange(total, device=query.device)
    hidden = (j > i) | (j <= i - (window or total + 1))
    group = query.shape[1] // key.shape[1]
    rows = []
    for h in range(query.shape[1]):
        scores = query[:, h].double() @ key[:, h // group].double().T * scale
        rows.append(scores.masked_fill(hidden, -math.inf).softmax(1) @ value[:, h // group].double())
    return torch.stack(rows, dim=1)


def replay_error(work: Work) -> float:
    """A captured step, replayed after every sequence became shorter by a token: the error to float64 of the new step."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work.run(0)
    work.fields["context_lens"] -= 1
    work.fields["token_slots"].copy_(torch.stack([slots[-2] for slots in work.slots]))
    graph.replay()
    got = output[0].double()
    expected = []
    for query, key, value in work.sequences(0):
        expected.append(exact(query, key[:-1], value[:-1], work.scale, **work.case.options))
    work.fields["context_lens"] += 1
    work.fields["token_slots"].copy_(torch.stack([slots[-1] for slots in work.slots]))
    error = float((got - torch.cat(expected)).abs().max() / torch.cat(expected).abs().max())
    return error if math.isfinite(error) else math.inf


def dense(work: Work) -> tuple[Callable[[int], torch.Tensor], float] | None:
    """SDPA on contiguous keys and values with no pages and no append: (the call, its error). None if SDPA cannot say the case."""
    lengths = set(work.case.rows)
    if len(lengths) != 1 or work.case.options:
        return None
    context, new = lengths.pop()
    if new > 1 and context > 0:
        return None
    B = len(work.case.rows)
    query = work.tokens[0][0].view(B, new, work.case.H, -1).transpose(1, 2)
    copies = []
    for copy in range(work.copies):
        pairs = [(key, value) for _, key, value in work.sequences(copy)]
        copies.append([torch.stack(side).transpose(1, 2).contiguous() for side in zip(*pairs, strict=True)])

    def call(copy: int) -> torch.Tensor:
        key, value = copies[copy]
        return F.scaled_dot_product_attention(query, key, value, is_causal=new > 1, scale=work.scale, enable_gqa=True)

    got = call(0).transpose(1, 2).flatten(0, 1).double()
    expected = torch.cat([exact(*sequence, work.scale) for sequence in work.sequences(0)])
    return call, float((got - expected).abs().max() / expected.abs().max())


Timer = Callable[[Callable[[int], torch.Tensor], int], dict[str, float]]


def run(time_calls: Timer, floor_us: Callable[[int, int], float]) -> list[dict[str, Any]]:
    """Rows of the result. `time_calls(call, copies)` gives microseconds a call; `floor_us(bytes, flops)` what the hardware allows.

    An implementation whose error is too large gets no numbers.
    """
    found = []
    for case in CASES:
        torch.cuda.empty_cache()
        work = Work(case, "cuda")
        errors = [work.error(copy) for copy in {0, work.copies - 1}]
        if all(new == 1 for _, new in case.rows) and not case.options:
            errors.append(replay_error(work))
            work.run(0)  # the captured step wrote elsewhere
        implementations: list[tuple[str, Callable[[int], torch.Tensor], float, bool]] = [(TritonPaged.name, work.run, max(errors), False)]
        peer = dense(work)
        if peer is not None:
            implementations.append(("torch.sdpa on contiguous keys and values", *peer, True))
        for name, call, error, is_peer in implementations:
            ok = error <= TOLERANCE[case.dtype]
            row = {"suite": "attention", "case": case.describe(), "impl": name, "peer": is_peer, "max_rel_err": error, "ok": ok}
            if ok:
                floor = floor_us(work.bytes, work.flops)
                times = time_calls(call, work.copies)
                row |= {"metric": "time of a call", "unit": "us", **times, "bytes": work.bytes, "flops": work.flops}
                row |= {"floor_us": floor, "fraction": floor / times["median"]}
            found.append(row)
        del work, implementations, peer
    return found
