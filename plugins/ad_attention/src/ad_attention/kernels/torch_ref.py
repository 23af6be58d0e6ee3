"""Softmax attention over paged keys and values in plain torch: every modifier, any mix of prefill and decode, CPU and CUDA."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ad_attention.kernels import torch_math
from ad_attention.kernels.distance import distance_buckets as bucket_table
from ad_attention.kernels.distance import parse_rule
from ad_attention.kernels.torch_math import Modifiers
from ad_attention.kernels.torch_plan import BAGGED, NONE, Group, Prefill, Shape, plan_buffers, plan_step
from ad_attention.scores import head_bias
from ad_core.api import BatchView, BufferSpec, Declined, Environment, Kernel, Limits, OpCall
from ad_core.graph.ops import define_op

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_attention::attention_torch(Tensor query, Tensor key, Tensor value, float scale, int? window, int? chunk, float? softcap, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? rel_bias, Tensor? key_bias, Tensor? distance_bias, Tensor? query_sinks, bool append, "
    "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)? key_bias_pages, Tensor page_table, Tensor plan, Tensor records, "
    "Tensor rows, Tensor slots, Tensor index, Tensor mask, Tensor? distance_buckets) -> Tensor"
)


class Pages:
    """The pools of one call, read and written by slot. A pool [pages, page_size, G, ...] is contiguous."""

    def __init__(self, pools: tuple[torch.Tensor | None, ...], page_table: torch.Tensor, rows: torch.Tensor, index: torch.Tensor):
        self.pools, self.page_table, self.rows, self.index = pools, page_table, rows, index

    def write(self, entries: tuple[torch.Tensor | None, ...], slots: torch.Tensor, tokens: int, start: int) -> None:
        """The first `tokens` of each of `entries` [1, T, G, ...] go to `slots`, which are consecutive from `start` on if it is not NONE."""
        for pool, entry in zip(self.pools, entries, strict=True):
            if pool is None or entry is None:
                continue
            new = entry[0] if entry.shape[1] == tokens else entry[0, :tokens]
            if start != NONE:
                _slots(pool, start, tokens).copy_(new)
            else:
                pool.flatten(0, 1).index_copy_(0, slots[:tokens], new)

    def view(self, start: int, length: int) -> list[torch.Tensor | None]:
        """Keys [1, G, L, D], values and biases in consecutive slots, without a copy."""
        return [None if pool is None else _slots(pool, start, length).transpose(0, 1)[None] for pool in self.pools]

    def gather(self, index: torch.Tensor, count: int, length: int, bagged: bool = False) -> list[Any]:
        """Keys [n, G, L, D], values and biases at a gather index [n, G, L]. With `bagged`, the values stay where they lie."""
        out: list[Any] = []
        for number, pool in enumerate(self.pools):
            if pool is None:
                out.append(None)
                continue
            flat, heads = pool.flatten(0, 2), pool.shape[2]
            if bagged and number == 1:
                out.append(torch_math.Bagged(flat, index.view(count, heads, 1, length)))
            else:
                out.append(flat.index_select(0, index).view(count, heads, length, *flat.shape[1:]))
        return out

    def stored(self, start: int, count: int, length: int) -> torch.Tensor:
        """The gather index that the plan holds from `start` on."""
        return self.index[start : start + count * length * self._heads]

    def decode_index(self, start: int, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gather index and the mask [n, 1, 1, L] of decodes `start` to `start + count`, where the plan does not hold them."""
        row, position, first = self.rows[:, start : start + count, None]
        wanted = position + torch.arange(1 - length, 1, device=row.device)
        mask = torch.zeros(wanted.shape, device=row.device).masked_fill_(wanted < first, -torch.inf)
        return self._head_index(self.page_table[row, wanted.clamp(min=first) // self._page_size], wanted.clamp(min=first)), mask[
            :, None, None
        ]

    def context_index(self, row: int, first: int, stop: int) -> torch.Tensor:
        """The gather index of positions `first` to `stop` of one batch row, where the plan does not hold it."""
        wanted = torch.arange(first, stop, device=self.page_table.device)
        return self._head_index(self.page_table[row, wanted // self._page_size][None], wanted)

    def _head_index(self, pages: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        slots = pages * self._page_size + positions % self._page_size  # [n, L]
        return (slots[:, None] * self._heads + torch.arange(self._heads, device=slots.device)[:, None]).flatten()

    @property
    def _page_size(self) -> int:
        assert self.pools[0] is not None
        return self.pools[0].shape[1]

    @property
    def _heads(self) -> int:
        assert self.pools[0] is not None
        return self.pools[0].shape[2]


def _slots(pool: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """A view [count, G, ...] of consecutive slots."""
    sizes, strides = pool.shape[2:], pool.stride()[1:]
    return pool.as_strided((count, *sizes), strides, pool.storage_offset() + start * strides[0])


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    rel_bias: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    distance_bias: torch.Tensor | None,
    query_sinks: torch.Tensor | None,
    append: bool,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key_bias_pages: torch.Tensor | None,
    page_table: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    index: torch.Tensor,
    mask: torch.Tensor,
    distance_buckets: torch.Tensor | None,
) -> torch.Tensor:
    """The canonical op on packed tokens: query [1, T, H, D], key [1, T, G, D], value [1, T, G, Dv] -> [1, T, H, Dv].

    Writes the step's keys, values and biases to the pools if `append`, and then reads the sequences from there. The plan's
    tensors are those of `torch_plan`; `distance_buckets` maps distances to columns of `rel_bias`, None if they are equal.
    Rows past the batch's tokens are zero.
    """
    tokens, decodes, num_groups, num_prefills, write_start, permuted, *lead = plan.tolist()
    # The fused kernel reads any strides but these, and does not say so.
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if query_sinks is not None:  # two sinks are one: that of the sum of their exponentials
        sinks = query_sinks[0] if sinks is None else torch.logaddexp(*(x.to(_wide(x)) for x in (query_sinks[0], sinks)))
    own = None if distance_bias is None else distance_bias[0]
    given = Modifiers(scale, window, chunk, softcap, sinks, alibi_slopes, rel_bias, distance_buckets, own)
    pages = Pages((key_pages, value_pages, key_bias_pages), page_table, rows, index)
    if append:
        pages.write((key, value, key_bias), slots, tokens, write_start)
    groups = [Group(*lead)] if num_groups else []
    T, H = query.shape[1:3]
    if num_groups == 1 and decodes == T and not permuted:  # the step of one or of a few alike: its result is the output
        return _decode_group(query[0], 0, groups[0], pages, mask, given)[None]

    prefills: list[Prefill] = []
    if num_groups > 1 or num_prefills:
        listed = records[: num_groups + num_prefills].tolist()
        groups = [Group(*record[: len(Group._fields)]) for record in listed[:num_groups]]
        prefills = [Prefill(*record[: len(Prefill._fields)]) for record in listed[num_groups:]]
    if num_prefills == 1 and prefills[0].size == T:  # the step of one prompt: likewise
        return prefill_chunk(query[0], key[0], value[0], None if key_bias is None else key_bias[0], prefills[0], pages, given)[None]

    out, start = query.new_empty(1, T, H, value.shape[3]), 0
    for group in groups:
        stop = start + group.size
        if permuted:
            chosen = rows[0, start:stop]
            result = _decode_group(query[0].index_select(0, chosen), start, group, pages, mask, given.of(chosen))
            out[0].index_copy_(0, chosen, result)
        else:
            out[0, start:stop] = _decode_group(query[0, start:stop], start, group, pages, mask, given.of(slice(start, stop)))
        start = stop
    for part in prefills:
        new = slice(part.token, part.token + part.size)
        bias = None if key_bias is None else key_bias[0, new]
        out[0, new] = prefill_chunk(query[0, new], key[0, new], value[0, new], bias, part, pages, given.of(new))
    if tokens < T:
        out[0, tokens:].zero_()
    return out


def _decode_group(query: torch.Tensor, start: int, group: Group, pages: Pages, mask: torch.Tensor, given: Modifiers) -> torch.Tensor:
    """query [n, H, D]: the decodes from the `start`-th on -> [n, H, Dv]."""
    count, length = group.size, group.length
    biases = []
    if group.view_start != NONE:
        keys, values, key_bias = pages.view(group.view_start, length)
    elif group.index_start != NONE:
        keys, values, key_bias = pages.gather(pages.stored(group.index_start, count, length), count, length, group.mode == BAGGED)
        if group.masked:
            biases.append(mask[group.index_start : group.index_start + count * length].view(count, 1, 1, length))
    else:
        index, ragged = pages.decode_index(start, count, length)
        keys, values, key_bias = pages.gather(index, count, length, group.mode == BAGGED)
        biases.append(ragged)
    assert keys is not None
    assert values is not None
    if key_bias is not None:
        biases.append(key_bias[:, :, None].float())
    if given.alibi_slopes is not None or given.rel_bias is not None:
        distance = torch.arange(length - 1, -1, -1, device=query.device)
        by_head = head_bias(distance, _wide(query), given.alibi_slopes, given.rel_bias, given.buckets)
        assert by_head is not None
        biases.append(by_head.view(1, keys.shape[1], -1, length))
    if given.distance_bias is not None:
        biases.append(_by_column(given.distance_bias, length).unflatten(1, (keys.shape[1], -1)))
    return torch_math.decode(query, keys, values, biases, given, group.mode)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_column(distance_bias: torch.Tensor, length: int) -> torch.Tensor:
    """Biases by distance [n, H, E] for the columns of a decode group, of which the last is the query's own: [n, H, L]."""
    near = distance_bias[..., :length].to(_wide(distance_bias)).flip(-1)
    return F.pad(near, (length - near.shape[-1], 0))


def prefill_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    chunk: Prefill,
    pages: Pages,
    given: Modifiers,
) -> torch.Tensor:
    """The new tokens of one sequence: query [m, H, D] -> [m, H, Dv]. Their own keys are at hand; the cached ones come from the pages."""
    length = chunk.context - chunk.first
    if not length:
        return torch_math.prefill(query, key, value, None, key_bias, chunk.context, given)
    if chunk.view_start != NONE:
        keys, values, biases = pages.view(chunk.view_start, length)
    else:
        stored = chunk.index_start != NONE
        index = pages.stored(chunk.index_start, 1, length) if stored else pages.context_index(chunk.row, chunk.first, chunk.context)
        keys, values, biases = pages.gather(index, 1, length)
    assert keys is not None
    assert values is not None
    if key_bias is not None and biases is not None:
        key_bias = torch.cat([biases[0].t(), key_bias])
    return torch_math.prefill(query, key, value, (keys[0], values[0]), key_bias, chunk.context, given)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


attention_torch = define_op(SCHEMA, _attention, _fake)


class TorchPaged(Kernel):
    """The reference that also has to be fast: `prepare` does whatever does not differ between layers."""

    name = "attention.softmax.torch"
    target = "ad_attention::attention"
    op = "ad_attention::attention_torch"
    dtypes = frozenset({"float32", "bfloat16", "float16", "float64"})
    graph = "never"

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        if call["rel_bias"] is not None and isinstance(parsed := parse_rule(call["rel_bias_rule"]), Declined):
            return parsed
        return None

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        specs = plan_buffers(int(call["key"].shape[2]), limits)
        if (table := table_of(call)) is not None:
            specs["distance_buckets"] = BufferSpec(tuple(table.shape), torch.int64)
        return specs

    def group_key(self, call: OpCall) -> Hashable:
        return shape_of(call), None if call["rel_bias"] is None else (call["rel_bias_rule"], int(call["rel_bias"].shape[1]))

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        plan_step(batch, shape_of(call), out)
        if (table := table_of(call)) is not None:
            out["distance_buckets"].copy_(table, non_blocking=True)


def shape_of(call: OpCall) -> Shape:
    query, key, value = call["query"], call["key"], call["value"]
    return Shape(
        query_heads=int(query.shape[2]),
        heads=int(key.shape[2]),
        head_dim=int(key.shape[3]),
        value_dim=int(value.shape[3]),
        dtype=query.dtype,
        window=call["window"],
        chunk=call["chunk"],
        fusable=call["softcap"] is None and key.shape[3] == value.shape[3],
        on_cpu=query.device.type == "cpu",
    )


def table_of(call: OpCall) -> torch.Tensor | None:
    return None if call["rel_bias"] is None else bucket_table(call["rel_bias_rule"], int(call["rel_bias"].shape[1]))
