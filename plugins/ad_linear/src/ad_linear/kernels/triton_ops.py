"""What the Triton kernels share: an honest `dot`, and rows of a tile.

Importing this module needs triton. Whether functions are compiled or interpreted is decided here and now, by
`TRITON_INTERPRET`: set it before the first import.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b):
    """a @ b of float32 tiles. The only caller of Triton's own dot: its default for float32 is tf32, which loses half of the digits.

    Three products of tf32 parts keep nearly all of them, on matrix units; products of float32 proper would hold whole rows and columns
    in a thread's registers.
    """
    return tl.dot(a, b, input_precision="ieee" if INTERPRET else "tf32x3")


@triton.jit
def log_sigmoid(x):
    """Without overflow at either end, and from operations that run in the interpreter."""
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def scores(queries, keys, C: tl.constexpr):
    """queries @ keys^T of [C, K] tiles, row by row: as operands of a matrix unit they would take all registers."""
    c = tl.arange(0, C)
    result = tl.zeros([C, C], tl.float32)
    for i in range(0, C):
        here = (c == i)[:, None]
        row = tl.sum(tl.where(here, queries, 0.0), axis=0)
        result = tl.where(here, tl.sum(keys * row[None, :], axis=1)[None, :], result)
    return result
