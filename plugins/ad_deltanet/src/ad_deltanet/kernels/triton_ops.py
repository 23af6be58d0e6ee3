"""What the Triton kernels share: an honest `dot`, rows of a tile, and keys of length 1.

Importing this module needs triton. Whether functions are compiled or interpreted is decided here and now, by
`TRITON_INTERPRET`: set it before the first import.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """a @ b of float32 tiles. The only caller of Triton's own dot: its default for float32 is tf32, which loses half of the digits, and
    a delta rule feeds its own results back thousands of times.

    Three products of tf32 parts keep nearly all of them, on matrix units; products of float32 proper would hold whole rows and columns
    in a thread's registers.
    """
    return tl.dot(a, b, input_precision="ieee" if INTERPRET else "tf32x3")


@triton.jit
def row_of(tile, chosen):
    """The row of a tile [C, N] where `chosen` [C] is true, as [N]."""
    return tl.sum(tl.where(chosen[:, None], tile, 0.0), axis=0)


@triton.jit
def normalised(tile, eps, axis: tl.constexpr, L2NORM: tl.constexpr):
    """`tile` with every vector along `axis` brought to length 1, if asked."""
    if L2NORM:
        tile = tile * tl.rsqrt(tl.sum(tile * tile, axis=axis, keep_dims=True) + eps)
    return tile
