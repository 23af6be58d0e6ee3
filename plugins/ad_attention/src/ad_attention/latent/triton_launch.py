"""The host side of latent attention in Triton. Shapes decide what is launched, never the contents of a tensor.

Importing this module needs triton; `triton_kernel` does so at the first call.
"""

from __future__ import annotations

import torch
import triton

from ad_attention.kernels.triton_append import append_rows
from ad_attention.kernels.triton_decode import combine_kernel
from ad_attention.kernels.triton_host import FP_FUSION, device_of, multiprocessors, unit_stride
from ad_attention.kernels.triton_ops import LOG2E
from ad_attention.kernels.triton_tiles import MIN_SPLIT, block
from ad_attention.latent.triton_rows import latent_kernel
from ad_attention.latent.triton_tiles import CHUNK_ROWS, heads_together, tiles


def latent_attention(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    up_weight: torch.Tensor,
    *,
    latent_pages: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    page_table: torch.Tensor,
    token_slots: torch.Tensor,
    partial_output: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    append: bool,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """The body of `ad_attention::mla_triton`; shapes and mutation are told in `triton_kernel`."""
    _, T, H, N = q_nope.shape
    R, P = latent.shape[2], k_rope.shape[2]
    B = cu_seqlens.shape[0] - 1
    by_head = up_weight.view(H, -1, R)
    key_up, value_up = by_head.split((N, by_head.shape[1] - N), 1)  # [H, N, R], [H, V, R]
    if T == 0 or B == 0:
        return q_nope.new_zeros(1, T, H, value_up.shape[1])
    q_rope = unit_stride(q_rope)
    with device_of(q_nope):
        if append:
            append_rows(latent_pages, token_slots, cu_seqlens, latent, k_rope)
        q_latent = torch.bmm(q_nope.squeeze(0).transpose(0, 1), key_up)  # [H, T, R]
        mixed = q_nope.new_empty(T, H, R)
        lists, sinks = (None if tensor is None else tensor.contiguous() for tensor in (selected, sinks))
        choices = None if selected is None else selected.shape[2]
        inputs = (q_latent, q_rope, latent_pages)
        places = (lists, cu_seqlens, context_lens, page_table, T, B)
        strides = (q_latent.stride(1), q_latent.stride(0), q_rope.stride(1), q_rope.stride(2), page_table.stride(0))
        pack = heads_together(H, q_nope.element_size())
        head_programs = -(-H // pack)
        shape = {"WINDOW": window, "CHOICES": choices, "H": H, "MIN_SPLIT": MIN_SPLIT, **FP_FUSION}
        constants = {"PAGE_SIZE": latent_pages.shape[1], "R": R, "P": P, "PACK": pack, "BLOCK_R": block(R), "BLOCK_P": block(P), **shape}

        # As in softmax attention: with T <= B every row is a query of its own; else sequences of one token go that way,
        # and the others in blocks of tokens or, if each token has its own keys, row by row without splits.
        by_row = T <= B
        items, kind = (T, "rows") if by_row else (B, "singles")
        splits = 1 if partial_lse is None else partial_lse.shape[-1]
        workers = min(splits, -(-4 * multiprocessors(q_nope.device) // (items * head_programs)))
        size = tiles(block(pack), R, q_nope.element_size())
        latent_kernel[(items, head_programs, workers)](
            mixed, partial_output, partial_lse, *inputs, sinks if splits == 1 else None, *places, *strides, scale * LOG2E.value,
            ITEMS=kind, S=splits, BLOCK_Q=1, **size.launch, **constants,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(items, H)](
                mixed, partial_output, partial_lse, sinks, cu_seqlens, context_lens, B,
                ITEMS=kind, OWN_SINKS=False, CHUNK=None, DV=R, S=splits, BLOCK_N=size.block_n,
                BLOCK_S=triton.next_power_of_2(splits), BLOCK_DV=block(R), num_warps=8, **shape,
            )  # fmt: skip
        if not by_row:
            items, kind, tokens = T, "several", 1
            if selected is None:
                size = tiles(CHUNK_ROWS, R, q_nope.element_size())
                tokens = max(1, size.block_m // pack)
                items, kind = -(-T // tokens) + B, "blocks"
            latent_kernel[(items, head_programs, 1)](
                mixed, None, None, *inputs, sinks, *places, *strides, scale * LOG2E.value,
                ITEMS=kind, S=1, BLOCK_Q=tokens, **size.launch, **constants,
            )  # fmt: skip
        result = torch.bmm(mixed.transpose(0, 1), value_up.transpose(1, 2))  # [H, T, V]
    return result.transpose(0, 1).unsqueeze(0).clone(memory_format=torch.contiguous_format)
