"""Finds rotary embeddings, which models write as seven operations, and makes one of each."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ad_core.graph.calls import bound_arguments
from ad_core.graph.edit import is_op
from ad_fusion.fusing import Found, Fusion, called, other_factor
from ad_fusion.rotary import LIBRARY, rotary


class FuseRotary(Fusion):
    """`x * cosine + cat((-x2, x1)) * sine`, where x1 and x2 are the halves of x [B, P, Q, D], becomes `ad_fusion::rotary` on the CPU."""

    name = "fusion.rotary"
    op = rotary
    anchor = "aten::add"
    requires_ops = ("aten::neg", "aten::cat")

    def find(self, node: Node) -> Found | None:
        """The rotation that ends in this sum. All between is read by nothing else."""
        if node.kwargs or len(node.args) != 2:
            return None
        for plain, turned in (node.args, node.args[::-1]):
            straight, crossed = called(plain, "aten::mul"), called(turned, "aten::mul")
            if straight is None or crossed is None or straight is crossed:
                continue
            for exchanged in crossed.all_input_nodes:
                x = _halves_exchanged(exchanged)
                if x is None or x not in straight.args:
                    continue
                cosine, sine = other_factor(straight, x), other_factor(crossed, exchanged)
                if cosine is not None and sine is not None:
                    swapped = _layout(node.meta["val"])
                    return Found(node, (x, cosine, sine, swapped), _why_not(node, x, cosine, sine))
        return None


def _why_not(result: Node, *operands: Node) -> str | None:
    out, x, *angles = (node.meta["val"] for node in (result, *operands))
    if any(value.dim() != 4 for value in (x, *angles)):
        return "it is not of four dimensions"
    if any(value.dtype != x.dtype for value in (out, *angles)):
        return "its angles are of another dtype"
    if [str(size) for size in out.shape] != [str(size) for size in x.shape] or any(value.shape[3] != x.shape[3] for value in angles):
        return "its angles are not of its shape"
    if _layout(out) is None:
        return "its result lies in no order that the kernel writes"
    declined = LIBRARY.declined(x.dtype)
    return None if declined is None else declined.reason


def _halves_exchanged(value: object) -> Node | None:
    """x, if the value is (-x2, x1) of its halves x1 and x2."""
    joined = called(value, "aten::cat")
    if joined is None or not isinstance(joined.args[0], list | tuple) or len(joined.args[0]) != 2:
        return None
    negative, lower = joined.args[0]
    negative = called(negative, "aten::neg")
    first, second = _half(lower), _half(negative.args[0] if negative is not None else None)
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (0, 1):
        return None
    dim = joined.args[1] if len(joined.args) > 1 else 0
    return first[0] if dim in (-1, joined.meta["val"].dim() - 1) else None


def _half(value: object) -> tuple[Node, int] | None:
    """(x, 0) of the first half of x's last dimension, (x, 1) of the second."""
    if not isinstance(value, Node):
        return None
    if value.op == "call_function" and value.target is operator.getitem:
        split, number = value.args
        return _part(split, number) if isinstance(split, Node) else None
    if not is_op(value, "aten::slice"):
        return None
    given = bound_arguments(value)
    x, start, stop = given["self"], given["start"] or 0, given["end"]
    width = x.meta["val"].shape[-1]
    if given["dim"] not in (-1, x.meta["val"].dim() - 1) or given["step"] != 1 or not isinstance(width, int) or width % 2:
        return None
    if start == 0 and stop == width // 2:
        return x, 0
    return (x, 1) if start == width // 2 and (stop is None or stop >= width) else None


def _part(split: Node, number: Any) -> tuple[Node, int] | None:
    """The same of a part of a split in two."""
    if not is_op(split, "aten::chunk", "aten::split", "aten::split_with_sizes") or number not in (0, 1):
        return None
    x = split.args[0]
    dim = split.args[2] if len(split.args) > 2 else 0
    widths = [part.shape[-1] for part in split.meta["val"]]
    if not isinstance(x, Node) or dim not in (-1, x.meta["val"].dim() - 1) or len(widths) != 2 or widths[0] != widths[1]:
        return None
    return x, number


def _layout(result: torch.Tensor) -> bool | None:
    """Whether [B, P, Q, D] lies in memory as [B, Q, P, D]; None if it lies in neither order."""
    if result.dim() != 4:
        return None
    if result.is_contiguous():
        return False
    return True if result.transpose(1, 2).is_contiguous() else None
