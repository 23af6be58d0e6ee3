"""Runs one kernel on one call, step by step, over pools of its own: what the engine does, without model, graph or scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from ad_core.api import CanonicalOp, Environment, Kernel, Limits, Mixer, PagedTokens, Resource, Role
from ad_core.api.batch import FIELDS
from ad_core.cache.batch import Batch, BatchBuilder, GroupView, Row
from ad_core.cache.binding import bind_by_name
from ad_core.graph.ops import find_op
from ad_core.testing.calls import on_device, symbolic_call
from ad_core.testing.cases import Case
from ad_core.testing.poison import poison_

Outputs = tuple[torch.Tensor, ...]
Layout = Callable[[torch.Tensor], torch.Tensor]
"""Gives packed tokens [1, T, ...], or a PARAM argument, other strides, or none."""


def bind_arguments(
    op: OpOverload,
    call: Mapping[str, Any],
    fields: Mapping[str, torch.Tensor],
    resources: Mapping[str, torch.Tensor],
    buffers: Mapping[str, torch.Tensor],
    append: bool,
) -> dict[str, Any]:
    """What every argument of the cached op is bound to, by name: exactly what the insertion pass would bind."""
    args, kwargs = bind_by_name(op, call=call, resources=resources, buffers=buffers, append=append, field=lambda name: fields[name])
    positional = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    return {**dict(zip(positional, args, strict=True)), **kwargs}


@dataclass
class Running:
    """A sequence of the harness: batch row `index` of the case's arguments, of which `context` tokens are cached."""

    index: int
    slot: int
    context: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Bound:
    """A step that is ready to run: every argument of the cached op by name, and what the step may write."""

    arguments: dict[str, Any]
    rows: dict[int, slice]
    """Packed tokens of each sequence."""
    entries: dict[str, set[int]]
    """Rows of each pool: entries of pages, counted over all pages, or slots."""
    num_tokens: int


class Harness:
    """One call of a mixer, or of an op without memory, run by one kernel.

    Owns the pools (NaN at first, null page and slot too), the kernel's buffers (poisoned at first) and the pages of its
    sequences; pages and slots are dealt out in the order of `seed`. Pages that a window has left are taken away from their
    sequence and poisoned, as the engine would give them to others.
    """

    def __init__(
        self,
        mixer: CanonicalOp,
        kernel: Kernel,
        case: Case,
        *,
        dtype: torch.dtype = torch.float32,
        sequences: int = 3,
        length: int = 24,
        page_size: int = 4,
        device: str = "cpu",
        seed: int = 0,
        data_seed: int = 0,
        layout: Layout = torch.Tensor.contiguous,
        param_layout: Layout = torch.Tensor.contiguous,
    ):
        self.mixer, self.kernel, self.case, self.layout = mixer, kernel, case, layout
        self.device = torch.device(device)
        self.data = on_device(case.arguments(sequences, length, dtype, data_seed), self.device)
        for name, value in self.data.items():
            if mixer.roles[name] == Role.PARAM and isinstance(value, torch.Tensor):
                self.data[name] = param_layout(value)
        self.call = symbolic_call(mixer, case, dtype, device)
        self.limits = Limits(sequences * length + 16, sequences + 4, length, page_size)
        self.resources: Mapping[str, Resource] = mixer.resources(self.call, case.options) if isinstance(mixer, Mixer) else {}
        self.windows = {r.window for r in self.resources.values() if isinstance(r, PagedTokens)}
        assert len(self.windows) <= 1, f"paged resources of one call must have one window, not {self.windows}"
        num_pages, num_slots = sequences * self.limits.max_pages + 3, sequences + 3
        dealer = random.Random(seed)
        self.free_pages = dealer.sample(range(1, num_pages), num_pages - 1)
        self.free_slots = dealer.sample(range(1, num_slots), num_slots - 1)
        self.pools = {
            name: poison_(
                torch.empty(
                    (num_pages, resource.entries(page_size), *resource.per_token)
                    if isinstance(resource, PagedTokens)
                    else (num_slots, *resource.shape),
                    dtype=resource.dtype,
                    device=self.device,
                )
            )
            for name, resource in self.resources.items()
        }
        self.op = find_op(kernel.op)
        self.buffers = {
            name: poison_(torch.empty(spec.shape, dtype=spec.dtype, device="cpu" if spec.device == "host" else self.device))
            for name, spec in kernel.buffers(self.call, self.limits).items()
        }
        self.builder = BatchBuilder(self.limits, 1, self.device)
        self.sequences = [Running(index, self.free_slots.pop()) for index in range(sequences)]
        self.freed_pages = 0

    @property
    def environment(self) -> Environment:
        """Where the kernel runs."""
        return Environment(self.device.type, page_size=self.limits.page_size)

    def release(self, index: int) -> None:
        """Ends a sequence; its pages and slot are the next to be given out, as they are. It may start again."""
        sequence = self.sequences[index]
        self.free_pages += [page for page in sequence.pages if page]
        self.free_slots.append(sequence.slot)
        self.sequences[index] = Running(index, self.free_slots.pop())

    def bind(self, work: Sequence[tuple[int, int]], *, pad_tokens: int = 0, pad_sequences: int = 0, append: bool = True) -> Bound:
        """Prepares a step in which each (sequence, count) of `work` goes on by `count` tokens. Padded rows hold large garbage."""
        work = sorted(work, key=lambda entry: entry[1] > 1)  # decodes first: a promise of the batch
        rows, bounds, start = [], {}, 0
        for index, count in work:
            sequence = self.sequences[index]
            self._give_pages(sequence, sequence.context + count)
            rows.append(Row([0] * count, sequence.context, index + 1, (list(sequence.pages),), sequence.slot))
            bounds[index] = slice(start, start := start + count)
        batch = self.builder.build(rows)
        call = {**{a.name: a.default_value for a in self.mixer.op._schema.arguments if a.has_default_value()}, **self.data}
        for name, value in self.data.items():
            if self.mixer.roles[name] == Role.TOKEN and value is not None:
                call[name] = self._pack(value, work, pad_tokens)
        self.kernel.prepare(GroupView(batch, 0), self.call, self.buffers)
        fields = {name: self._padded(batch, name, pad_tokens, pad_sequences) for name in FIELDS}
        return Bound(
            bind_arguments(self.op, call, fields, self.pools, self.buffers, append),
            bounds,
            {name: self._entries(batch, resource) for name, resource in self.resources.items()},
            start,
        )

    def run(self, bound: Bound) -> Outputs:
        """Calls the cached op. The results are packed: [1, T, ...]."""
        args, kwargs = [], {}
        for argument in self.op._schema.arguments:
            if argument.kwarg_only:
                kwargs[argument.name] = bound.arguments[argument.name]
            else:
                args.append(bound.arguments[argument.name])
        result = self.op(*args, **kwargs)
        return result if isinstance(result, tuple) else (result,)

    def step(self, work: Sequence[tuple[int, int]]) -> dict[int, Outputs]:
        """One step; the outputs of each sequence's new tokens, [count, ...] each."""
        bound = self.bind(work)
        results = self.run(bound)
        for index, count in work:
            self.sequences[index].context += count
            self._free_left_pages(self.sequences[index])
        return {index: tuple(result[0, rows].clone() for result in results) for index, rows in bound.rows.items()}

    def _pack(self, value: torch.Tensor, work: Sequence[tuple[int, int]], pad_tokens: int) -> torch.Tensor:
        parts = [value[index, self.sequences[index].context :][:count] for index, count in work]
        if pad_tokens:
            parts.append(torch.full((pad_tokens, *value.shape[2:]), 99, dtype=value.dtype, device=value.device))
        return self.layout(torch.cat(parts)[None])

    def _padded(self, batch: Batch, name: str, pad_tokens: int, pad_sequences: int) -> torch.Tensor:
        """A device field as a padded step has it: token and sequence fields go on with zeros, `cu_seqlens` with its last value."""
        value = batch.device_field(name)
        extra = {"positions": pad_tokens, "token_slots": pad_tokens, "output_rows": 0}.get(name, pad_sequences)
        tail = value[-1:] if name == "cu_seqlens" else torch.zeros_like(value[:1])
        return torch.cat([value, *[tail] * extra]) if extra else value.clone()

    def _entries(self, batch: Batch, resource: Resource) -> set[int]:
        """Rows of the resource's pool that belong to the step."""
        if not isinstance(resource, PagedTokens):
            return set(batch.host_field("state_slots").tolist())
        size, tokens = self.limits.page_size, zip(*(batch.host_field(name).tolist() for name in ("token_slots", "positions")), strict=True)
        return {
            slot // size * resource.entries(size) + slot % size // resource.every
            for slot, position in tokens
            if (position + 1) % resource.every == 0
        }

    def _give_pages(self, sequence: Running, tokens: int) -> None:
        if self.windows:
            while len(sequence.pages) * self.limits.page_size < tokens:
                sequence.pages.append(self.free_pages.pop())

    def _free_left_pages(self, sequence: Running) -> None:
        """Tokens further back than the window are never read again: their pages go, poisoned, to whoever needs one."""
        for window in self.windows:
            if window is None:
                continue
            dead = max(0, sequence.context - window + 1) // self.limits.page_size
            for place, page in enumerate(sequence.pages[:dead]):
                if page:
                    for name, resource in self.resources.items():
                        if isinstance(resource, PagedTokens):
                            poison_(self.pools[name][page])
                    self.free_pages.insert(0, page)
                    sequence.pages[place] = 0
                    self.freed_pages += 1
