"""The host side of the Triton kernels: which are launched, with what grid. Shapes decide, never the contents of a tensor.

Importing this module needs triton; `triton_paged` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton

from ad_attention.kernels.triton_append import append_kernel
from ad_attention.kernels.triton_decode import combine_kernel, decode_kernel
from ad_attention.kernels.triton_ops import INTERPRET, LOG2E
from ad_attention.kernels.triton_prefill import prefill_kernel
from ad_attention.kernels.triton_tiles import MIN_SPLIT, PACK_LIMIT, block, decode_tiles, prefill_tiles

FP_FUSION = {"enable_fp_fusion": True}
"""Said aloud, because Triton's default changes between releases."""


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
) -> torch.Tensor:
    """The body of `ad_attention::attention_triton`; shapes and mutation are told in `triton_paged`."""
    query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
    _, T, H, D = query.shape
    G, DV = value.shape[2:]
    B = cu_seqlens.shape[0] - 1
    output = query.new_empty(1, T, H, DV)
    if T == 0 or B == 0:
        return output.zero_()
    with _device(query):
        if append:
            _append(key, value, key_bias, key_pages, value_pages, key_bias_pages, token_slots, cu_seqlens)
        if rel_bias is not None:
            # Any rule is a table by distance, whose last entry serves everything further away.
            rel_bias = rel_bias.contiguous() if distance_buckets is None else rel_bias.index_select(1, distance_buckets)
        if query_sinks is not None:  # two sinks are one: that of the sum of their exponentials
            own = query_sinks[0].contiguous()
            sinks = own if sinks is None else torch.logaddexp(own.float(), sinks.float())
        inputs = (query, key_pages, value_pages, key_bias_pages)
        slopes, own_bias = (None if tensor is None else tensor.contiguous() for tensor in (alibi_slopes, distance_bias))
        biases = (slopes, rel_bias, own_bias)
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
        # step of pure decode. With T > B sequences of one token go that way, the others to the prefill kernel.
        by_row = T <= B
        items = T if by_row else B
        splits = 1 if partial_lse is None else partial_lse.shape[-1]
        tiles = decode_tiles(D, DV, query.element_size())
        workers = min(splits, -(-4 * _multiprocessors(query.device) // (items * head_programs)))
        decode_kernel[(items, head_programs, workers)](
            output, partial_output, partial_lse, *inputs, sinks if splits == 1 else None, *biases, *lengths, B, *strides, *scales,
            BY_ROW=by_row, S=splits, MIN_SPLIT=MIN_SPLIT, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, **constants,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(items, H)](
                output, partial_output, partial_lse, sinks, cu_seqlens, context_lens, B,
                BY_ROW=by_row, OWN_SINKS=query_sinks is not None, WINDOW=window, CHUNK=chunk, H=H, DV=DV, S=splits,
                MIN_SPLIT=MIN_SPLIT, BLOCK_N=tiles.block_n, BLOCK_S=triton.next_power_of_2(splits), BLOCK_DV=block(DV),
                num_warps=4, **FP_FUSION,
            )  # fmt: skip
        if not by_row:
            tiles = prefill_tiles(D, DV, query.element_size())
            blocks = -(-T // (tiles.block_m // pack)) + B
            prefill_kernel[(blocks, head_programs)](
                output, *inputs, sinks, *biases, *lengths, T, B, *strides, *scales,
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **constants,
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


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Programs that run side by side: asked of Triton's driver, so that a stand-in for a GPU can answer. One in the interpreter."""
    if INTERPRET.value:
        return 1
    count: int = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["multiprocessor_count"]
    return count
