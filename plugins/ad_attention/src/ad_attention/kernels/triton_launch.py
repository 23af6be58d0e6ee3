"""The host side of the Triton kernels: which are launched, with what grid. Shapes decide, never the contents of a tensor.

Importing this module needs triton; `triton_paged` does so at the first call.
"""

from __future__ import annotations

import torch
import triton

from ad_attention.kernels.triton_append import append_kernel
from ad_attention.kernels.triton_decode import combine_kernel, decode_kernel
from ad_attention.kernels.triton_host import FP_FUSION, device_of, multiprocessors, unit_stride
from ad_attention.kernels.triton_ops import LOG2E
from ad_attention.kernels.triton_prefill import prefill_kernel
from ad_attention.kernels.triton_tiles import MIN_SPLIT, PACK_LIMIT, block, decode_tiles, prefill_tiles


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key_bias_pages: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    token_slots: torch.Tensor,
    partial_output: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    distance_buckets: torch.Tensor | None,
    append: bool,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    rel_bias: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    query_sinks: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """The body of `ad_attention::attention_triton`; shapes and mutation are told in `triton_paged`. With `selected` [1, T, K], that of
    `ad_attention::selected_triton`."""
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    _, T, H, D = query.shape
    G, DV = value.shape[2:]
    B = cu_seqlens.shape[0] - 1
    output = query.new_empty(1, T, H, DV)
    if T == 0 or B == 0:
        return output.zero_()
    with device_of(query):
        if append:
            _append(key, value, key_bias, key_pages, value_pages, key_bias_pages, token_slots, cu_seqlens)
        if rel_bias is not None:
            # Any rule is a table by distance, whose last entry serves everything further away.
            rel_bias = rel_bias.contiguous() if distance_buckets is None else rel_bias.index_select(1, distance_buckets)
        if query_sinks is not None:  # two sinks are one: that of the sum of their exponentials
            own = query_sinks[0].contiguous()
            sinks = own if sinks is None else torch.logaddexp(own.float(), sinks.float())
        inputs = (query, key_pages, value_pages, key_bias_pages)
        sinks, slopes, own_bias = (None if tensor is None else tensor.contiguous() for tensor in (sinks, alibi_slopes, distance_bias))
        biases = (slopes, rel_bias, own_bias)
        choices = None if selected is None else selected.shape[2]
        lists = None if selected is None else selected.contiguous()
        lengths = (cu_seqlens, context_lens, page_table)
        strides = (query.stride(1), query.stride(2), page_table.stride(0))
        scales = (scale * LOG2E.value, None if softcap is None else softcap * LOG2E.value)
        pack = min(H // G, PACK_LIMIT)
        constants = {
            "WINDOW": window,
            "CHUNK": chunk,
            "DISTANCES": 0 if rel_bias is None else rel_bias.shape[1],
            "EXTENT": 0 if distance_bias is None else distance_bias.shape[3],
            "OWN_SINKS": query_sinks is not None,
            "PAGE_SIZE": key_pages.shape[1],
            "H": H,
            "G": G,
            "D": D,
            "DV": DV,
            "BLOCK_D": block(D),
            "BLOCK_DV": block(DV),
            "PACK": pack,
            **FP_FUSION,
        }
        head_programs = G * -(-(H // G) // pack)

        # With T <= B every row is treated as a query of its own: right for any mixture, and the whole of the work in a
        # step of pure decode. With T > B sequences of one token go that way, the others to the prefill kernel or, if each
        # token has its own keys, to the decode kernel too, without splits.
        by_row = T <= B
        items, kind = (T, "rows") if by_row else (B, "singles")
        splits = 1 if partial_lse is None else partial_lse.shape[-1]
        tiles = decode_tiles(D, DV, query.element_size())
        cut = {"MIN_SPLIT": MIN_SPLIT, "CHOICES": choices}
        workers = min(splits, -(-4 * multiprocessors(query.device) // (items * head_programs)))
        decode_kernel[(items, head_programs, workers)](
            output, partial_output, partial_lse, *inputs, sinks if splits == 1 else None, *biases, lists, *lengths, B, *strides, *scales,
            ITEMS=kind, S=splits, **cut, **tiles.launch, **constants,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(items, H)](
                output, partial_output, partial_lse, sinks, cu_seqlens, context_lens, B,
                ITEMS=kind, OWN_SINKS=query_sinks is not None, WINDOW=window, CHUNK=chunk, H=H, DV=DV, S=splits, BLOCK_N=tiles.block_n,
                BLOCK_S=triton.next_power_of_2(splits), BLOCK_DV=block(DV), num_warps=4, **cut, **FP_FUSION,
            )  # fmt: skip
        if selected is not None and not by_row:
            decode_kernel[(T, head_programs, 1)](
                output, None, None, *inputs, sinks, *biases, lists, *lengths, B, *strides, *scales,
                ITEMS="several", S=1, **cut, **tiles.launch, **constants,
            )  # fmt: skip
        elif not by_row:
            tiles = prefill_tiles(D, DV, query.element_size())
            blocks = -(-T // (tiles.block_m // pack)) + B
            prefill_kernel[(blocks, head_programs)](
                output, *inputs, sinks, *biases, *lengths, T, B, *strides, *scales,
                **tiles.launch, **constants,
            )  # fmt: skip
    return output


def _append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    key_bias_pages: torch.Tensor | None,
    token_slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> None:
    _, T, G, D = key.shape
    DV = value.shape[3]
    # About 4096 elements a program: 16 bytes a thread and load, with some to spare.
    block_g = min(triton.next_power_of_2(G), max(1, 4096 // max(block(D), block(DV))))
    bias_strides = (0, 0) if key_bias is None else (key_bias.stride(1), key_bias.stride(2))
    append_kernel[(T, -(-G // block_g))](
        key, value, key_bias, key_pages, value_pages, key_bias_pages, token_slots, cu_seqlens, cu_seqlens.shape[0] - 1,
        key.stride(1), key.stride(2), value.stride(1), value.stride(2), *bias_strides,
        G=G, D=D, DV=DV, BLOCK_G=block_g, BLOCK_D=block(D), BLOCK_DV=block(DV), num_warps=4, **FP_FUSION,
    )  # fmt: skip
