"""The host side of the Triton kernels: which choices make a block, and with what tiles. Shapes decide, never the contents of a tensor, so
a CUDA graph may hold every launch.

Importing this module needs triton; `triton_moe` does so at the first call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ad_moe.gating import Gating
from ad_moe.kernels.triton_grouped import down_kernel, up_kernel

FP_FUSION = {"enable_fp_fusion": True}
"""Said aloud, because Triton's default changes between releases."""


@dataclass(frozen=True)
class Tiles:
    """Choices, columns and depth that a program has at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles(choices: int, num_experts: int, itemsize: int, interleaved: bool) -> Tiles:
    """By the choices that an expert gets if all get the same. From what compiles for sm_90 without local memory; not measured.

    Interleaved columns are loaded one by one, which takes registers for their addresses.
    """
    each = choices // num_experts
    if itemsize > 2:
        return Tiles(16 if each <= 16 else 32, 32, 32, 4, 2)
    if each <= 16:
        return Tiles(16, 64, 64 if interleaved else 128, 4, 4)
    return Tiles(64, 64, 64, 4, 3) if each <= 64 else Tiles(128, 64, 64, 8, 3)


def experts(
    tokens: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    gate: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    up_transposed: bool,
    down_transposed: bool,
    weigh_input: bool,
    gating: Gating,
) -> torch.Tensor:
    """The body of `ad_moe::moe_triton`: [.., D] -> [.., O]."""
    x = tokens.flatten(0, -2)
    x = x if x.stride(-1) == 1 else x.contiguous()
    scale = weights.reshape(-1).contiguous()
    if up_transposed:
        up, gate = up.transpose(1, 2), None if gate is None else gate.transpose(1, 2)
    down = down.transpose(1, 2) if down_transposed else down
    gate, up, gate_bias, up_bias = _parts(gating, gate, up, up_bias)
    num_experts, inner, choices = up.shape[0], up.shape[1], selected.shape[-1]
    depth, width = x.shape[1], down.shape[1]
    number = selected.numel()
    results = x.new_zeros(number, width)
    if number:
        size = tiles(number, num_experts, x.element_size(), gating.layout == "interleaved")
        order, blocks = schedule(selected, num_experts, size.block_m)
        hidden = x.new_empty(number, inner)
        common = {"BLOCK_M": size.block_m, "BLOCK_N": size.block_n, "BLOCK_K": size.block_k, "WEIGH": weigh_input}
        launch = {"num_warps": size.num_warps, "num_stages": size.num_stages, **FP_FUSION}
        with _device(x):
            up_kernel[(blocks.shape[0], -(-inner // size.block_n))](
                hidden, x, scale, order, blocks, gate, up, gate_bias, up_bias, x.stride(0),
                *((0, 0, 0) if gate is None else gate.stride()), *up.stride(), *((0, 0) if up_bias is None else up_bias.stride()),
                CHOICES=choices, D=depth, I=inner, ACTIVATION=gating.activation, ALPHA=gating.alpha, LIMIT=gating.limit,
                LIMIT_ACTIVATED=gating.limit_activated, OFFSET=gating.offset, GATE_CAP=gating.gate_cap, UP_CAP=gating.up_cap,
                **common, **launch,
            )  # fmt: skip
            down_kernel[(blocks.shape[0], -(-width // size.block_n))](
                results, hidden, scale, order, blocks, down, None if down_bias is None else down_bias.contiguous(), *down.stride(),
                I=inner, O=width, SHARED=None, **common, **launch,
            )  # fmt: skip
    if choices > 1:
        results = results.view(-1, choices, width).sum(1)  # PyTorch sums half precision in float32
    return results.to(tokens.dtype).view(*tokens.shape[:-1], width)


def linear(tokens: torch.Tensor, selected: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The body of `ad_moe::routed_linear_triton`: [.., D] or [.., K, D] -> [.., K, O]."""
    shared = 1 if tokens.dim() > selected.dim() else selected.shape[-1]
    x, number = tokens.reshape(-1, tokens.shape[-1]).contiguous(), selected.numel()
    num_experts, width, depth = weight.shape
    results = x.new_zeros(number, width)
    if number:
        size = tiles(number, num_experts, x.element_size(), interleaved=False)
        order, blocks = schedule(selected, num_experts, size.block_m)
        with _device(x):
            down_kernel[(blocks.shape[0], -(-width // size.block_n))](
                results, x, None, order, blocks, weight, None, *weight.stride(),
                I=depth, O=width, SHARED=shared, WEIGH=True, BLOCK_M=size.block_m, BLOCK_N=size.block_n, BLOCK_K=size.block_k,
                num_warps=size.num_warps, num_stages=size.num_stages, **FP_FUSION,
            )  # fmt: skip
    return results.view(*selected.shape, width)


def schedule(selected: torch.Tensor, num_experts: int, block_m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices in the order of their experts, [N] int32, and the blocks, [programs, 3] int32: expert (-1 for a program that is not needed),
    first and one past the last choice of the order. Nothing is read on the host, so there are as many programs as there could be blocks."""
    ids = selected.flatten()
    number = ids.numel()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    ids, order = ids.sort()
    borders = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device))  # [E + 1]
    needed = (borders.diff() + block_m - 1) // block_m
    ends = needed.cumsum(0)
    program = torch.arange(-(-number // block_m) + min(num_experts, number), device=ids.device)
    expert = torch.searchsorted(ends, program, right=True)
    there = expert.clamp(max=num_experts - 1)
    first = borders[there] + (program - (ends - needed)[there]) * block_m
    rows = torch.stack([torch.where(expert < num_experts, expert, -1), first, borders[there + 1]], 1)
    return order.int(), rows.int()


def _parts(
    gating: Gating, gate: torch.Tensor | None, up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gate and up [E, I, D] and their biases [E, I] as views, wherever the layout has them."""
    if gating.layout in ("none", "separate"):
        return gate, up, None, bias
    apart = (slice(None, None, 2), slice(1, None, 2)) if gating.layout == "interleaved" else _halves(up.shape[1])
    biases = (None, None) if bias is None else (bias[:, apart[0]], bias[:, apart[1]])
    return up[:, apart[0]], up[:, apart[1]], *biases


def _halves(size: int) -> tuple[slice, slice]:
    return slice(size // 2), slice(size // 2, None)


def _device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type != "cuda" or not torch.cuda.is_initialized():
        return nullcontext()
    return torch.cuda.device(tensor.device)
