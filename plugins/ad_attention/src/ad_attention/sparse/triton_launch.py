"""The host side of the indexer in Triton: a kernel scores, PyTorch takes the best. Shapes decide what is launched, never contents.

Importing this module needs triton; `triton_select` does so at the first call.
"""

from __future__ import annotations

import torch

from ad_attention.kernels.triton_append import append_rows
from ad_attention.kernels.triton_host import FP_FUSION, device_of, multiprocessors, unit_stride
from ad_attention.kernels.triton_tiles import Tiles, block
from ad_attention.sparse.torch_select import best
from ad_attention.sparse.triton_scores import score_kernel

MAX_SCORES = 1 << 24
"""Scores that are kept at once; what ranks them takes five times the memory. A step with more is scored in parts."""


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor,
    *,
    count: int,
    scale: float,
    append: bool,
    index_pages: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    token_slots: torch.Tensor,
) -> torch.Tensor:
    """The body of `ad_attention::select_triton`; shapes and mutation are told in `triton_select`."""
    query = unit_stride(query)
    _, T, I, D = query.shape  # noqa: E741
    B, length = cu_seqlens.shape[0] - 1, page_table.shape[1] * index_pages.shape[1]
    if T == 0 or B == 0:
        return torch.zeros(1, T, count, dtype=torch.int64, device=query.device)
    with device_of(query):
        if append:
            append_rows(index_pages, token_slots, cu_seqlens, key)
        rows, chosen = max(1, MAX_SCORES // length), []
        tiles = score_tiles(I, query.element_size())
        for first in range(0, T, rows):  # one part for most steps
            number = min(rows, T - first)
            scores = torch.full((number, length), -torch.inf, dtype=torch.float32, device=query.device)
            workers = min(-(-length // tiles.block_n), -(-4 * multiprocessors(query.device) // number))
            score_kernel[(number, workers)](
                scores, query, weight, index_pages, cu_seqlens, context_lens, page_table, first, B,
                query.stride(1), query.stride(2), weight.stride(1), weight.stride(2), page_table.stride(0), scale,
                LENGTH=length, PAGE_SIZE=index_pages.shape[1], I=I, D=D, BLOCK_I=tiles.block_m, BLOCK_D=block(D),
                BLOCK_N=tiles.block_n, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **FP_FUSION,
            )  # fmt: skip
            chosen.append(best(scores, count))
        live = torch.arange(T, device=query.device) < cu_seqlens.narrow(0, B, 1)
    return torch.where(live.view(1, -1, 1), torch.cat(chosen), 0)


def score_tiles(heads: int, itemsize: int) -> Tiles:
    """All index heads of a token against some keys: from what compiles for sm_90 without local memory, unmeasured on a device."""
    return Tiles(block(heads), 64, 4, 3) if itemsize == 2 else Tiles(block(heads), 32, 8, 2)
