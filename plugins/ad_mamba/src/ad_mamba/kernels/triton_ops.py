"""What the Triton kernels share. Importing this module needs triton.

Whether functions are compiled or interpreted is decided here and now, by `TRITON_INTERPRET`: set it before the first import.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b of two float32 tiles. The only caller of Triton's own dot, whose default for float32 loses half of the digits."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def time_step(dt, bias, SOFTPLUS: tl.constexpr, low, high):
    """softplus(dt + bias) within its limits; `bias`, `low` and `high` may be None."""
    step = dt.to(tl.float32)
    if bias is not None:
        step += bias
    if SOFTPLUS:
        step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    if low is not None:
        step = tl.maximum(step, low)
    if high is not None:
        step = tl.minimum(step, high)
    return step


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))
