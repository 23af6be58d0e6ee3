"""Softmax attention over paged keys and values on the CPU, in C: decodes (`native_decode.c`), and chunks of prompts in bfloat16
(`native_prefill.c`) unless scores have biases. Other chunks are computed in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch

from ad_attention.kernels.torch_math import Modifiers
from ad_attention.kernels.torch_plan import Gather, Prefill, plan_chunks
from ad_attention.kernels.torch_ref import Pages, TorchPaged, prefill_chunk, shape_of, table_of
from ad_core.api import BatchView, BufferSpec, Declined, Environment, Limits, OpCall
from ad_core.graph.ops import define_op
from ad_core.native import NativeLibrary

LIBRARY = NativeLibrary(Path(__file__).with_name("native_decode.c"))
PREFILL = NativeLibrary(Path(__file__).with_name("native_prefill.c"))
LARGEST = 1 << 15
"""Numbers of one token's queries: as floats they lie on a thread's stack, and its results beside them."""

# No argument is keyword-only: PyTorch parses those of an op ten times slower, and a decode's layer would feel it.
SCHEMA = (
    "ad_attention::attention_native(Tensor query, Tensor key, Tensor value, float scale, int? window, int? chunk, float? softcap, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor? rel_bias, Tensor? key_bias, bool append, Tensor(a!) key_pages, "
    "Tensor(b!) value_pages, Tensor(c!)? key_bias_pages, Tensor page_table, Tensor seq_lens, Tensor token_slots, Tensor plan, "
    "Tensor records, Tensor index, Tensor? distance_buckets) -> Tensor"
)


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
    append: bool,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key_bias_pages: torch.Tensor | None,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    token_slots: torch.Tensor,
    plan: torch.Tensor,
    records: torch.Tensor,
    index: torch.Tensor,
    distance_buckets: torch.Tensor | None,
) -> torch.Tensor:
    """The canonical op on packed tokens: query [1, T, H, D], key [1, T, G, D], value [1, T, G, Dv] -> [1, T, H, Dv].

    Writes the step's keys, values and biases to the pools if `append`, and then reads the sequences from there. Rows past the
    batch's tokens are zero.
    """
    decode, write = _functions(query.dtype)
    tokens, decodes, longest, num_prefills = plan.tolist()
    _, T, H, D = query.shape
    G, Dv = value.shape[2:]
    if append:
        pairs = [(key, key_pages), (value, value_pages)]
        if key_bias is not None and key_bias_pages is not None:
            pairs.append((key_bias, key_bias_pages))
        for entries, pool in pairs:
            # rows may lie apart, as the parts of a merged projection do; what is inside of one may not
            rows = entries if entries[0, 0].is_contiguous() else entries.contiguous()
            size, width = rows.element_size(), pool[0, 0].numel()
            write(rows.data_ptr(), rows.stride(1) * size, pool.data_ptr(), token_slots.data_ptr(), tokens, width * size)
    out = query.new_empty(1, T, H, Dv)
    if decodes:
        rows = _rows(query)
        sinks_, slopes, relative = (None if x is None else x.float().contiguous() for x in (sinks, alibi_slopes, rel_bias))
        decode(
            rows.data_ptr(),
            rows.stride(1),
            key_pages.data_ptr(),
            value_pages.data_ptr(),
            _address(key_bias_pages),
            page_table.data_ptr(),
            page_table.stride(0),
            seq_lens.data_ptr(),
            _address(sinks_),
            _address(slopes),
            _address(relative),
            0 if relative is None else relative.shape[1],
            _address(distance_buckets),
            0 if distance_buckets is None else distance_buckets.shape[0],
            out.data_ptr(),
            decodes,
            H,
            G,
            D,
            Dv,
            key_pages.shape[1],
            -1 if window is None else window,
            chunk or 0,
            longest,
            scale,
            softcap or 0.0,
        )
    if num_prefills:
        given = Modifiers(scale, window, chunk, softcap, sinks, alibi_slopes, rel_bias, distance_buckets)
        pages = Pages((key_pages, value_pages, key_bias_pages), page_table, seq_lens, index)
        query, key, value = (_rows(x) for x in (query, key, value))
        biased = alibi_slopes is not None or rel_bias is not None or key_bias is not None
        plain = not biased and not D % 2 and query.dtype == torch.bfloat16 and PREFILL.declined(query.dtype) is None
        for record in records[:num_prefills].tolist():
            part = Prefill(*record[: len(Prefill._fields)])
            new = slice(part.token, part.token + part.size)
            if plain:
                _prefill(query[0, new], key[0, new], value[0, new], part, pages, given, out[0, new])
                continue
            bias = None if key_bias is None else key_bias[0, new]
            out[0, new] = prefill_chunk(query[0, new], key[0, new], value[0, new], bias, part, pages, given)
    if tokens < T:
        out[0, tokens:].zero_()
    return out


def _prefill(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Prefill, pages: Pages, given: Modifiers, out: torch.Tensor
) -> None:
    """The new tokens of one sequence: query [m, H, D], key [m, G, D] and value [m, G, Dv] to `out` [m, H, Dv]."""
    sinks = None if given.sinks is None else given.sinks.float().contiguous()
    key_pages, value_pages, _ = pages.pools
    _prefill_function()(
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        _address(key_pages),
        _address(value_pages),
        pages.page_table[part.row].data_ptr(),
        0 if key_pages is None else key_pages.shape[1],
        _address(sinks),
        out.data_ptr(),
        part.size,
        part.context,
        part.first,
        query.shape[1],
        key.shape[1],
        query.shape[2],
        value.shape[2],
        -1 if given.window is None else given.window,
        given.chunk or 0,
        given.scale,
        given.softcap or 0.0,
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows of [1, T, heads, size] may lie apart, as the parts of a merged projection do; what is inside of one may not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


@cache
def _prefill_function() -> Callable[..., None]:
    return PREFILL.function("attention_prefill", "pipipi" + "pppi" + "pp" + "iiiiiiiii" + "ff", torch.bfloat16)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@cache
def _functions(dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    decode = LIBRARY.function("attention_decode", "pippppippppipip" + "i" * 9 + "ff", dtype)
    return decode, LIBRARY.function("append", "pippii", dtype)


def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


attention_native = define_op(SCHEMA, _attention, _fake)


class NativePaged(TorchPaged):
    """Every key and value of a decode is read once, where it lies, by C that is compiled for this CPU."""

    name = "attention.softmax.native"
    op = "ad_attention::attention_native"
    priority = 50
    devices = frozenset({"cpu"})
    dtypes = frozenset({"float32", "bfloat16", "float16"})

    def supports(self, call: OpCall, environment: Environment) -> Declined | None:
        query, key, value = call["query"], call["key"], call["value"]
        if not query.dtype == key.dtype == value.dtype:
            return Declined("queries, keys and values are of different dtypes")
        if call["distance_bias"] is not None or call["query_sinks"] is not None:
            return Declined("it knows no biases and no sinks of a query")
        heads, width = int(query.shape[2]), max(int(key.shape[3]), int(value.shape[3]))
        if heads * width > LARGEST:
            return Declined(f"{heads} query heads of {width} are too many for a thread's stack")
        return super().supports(call, environment) or LIBRARY.declined(query.dtype)

    def buffers(self, call: OpCall, limits: Limits) -> Mapping[str, BufferSpec]:
        shared = super().buffers(call, limits)
        wanted = ("records", "index", "distance_buckets")
        return {"plan": BufferSpec((4,), torch.int64, "host"), **{name: shared[name] for name in wanted if name in shared}}

    def prepare(self, batch: BatchView, call: OpCall, out: Mapping[str, torch.Tensor]) -> None:
        shape = shape_of(call)
        chunks = plan_chunks(batch, shape, Gather(out["index"], batch.page_size, shape.heads))
        longest = int(batch.host("seq_lens")[: batch.num_decodes].max()) if batch.num_decodes else 0
        limits = [limit for limit in (longest, shape.window, shape.chunk) if limit is not None]
        out["plan"].numpy()[:] = batch.num_tokens, batch.num_decodes, min(limits), len(chunks)
        records = out["records"].numpy()
        for place, chunk in enumerate(chunks):
            records[place, : len(chunk)] = chunk
        if (table := table_of(call)) is not None:
            out["distance_buckets"].copy_(table)
