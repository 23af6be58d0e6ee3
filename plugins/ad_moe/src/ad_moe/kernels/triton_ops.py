"""What the Triton kernels share: an honest `dot`, and the gate between an expert's two projections.

Importing this module needs triton. Whether functions are compiled or interpreted is decided here and now, by `TRITON_INTERPRET`: set it
before the first import.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums. The interpreter would multiply the bit patterns of bfloat16 as integers, and the compiler's
    default for float32 is tf32, which loses half of the digits."""
    if INTERPRET:
        result = acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision="ieee")
    return result


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-LOG2E * x))


@triton.jit
def tanh(x):
    """From exp2, because CUDA's library functions do not run in the interpreter. Overflow gives exactly +-1."""
    return 1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * x) + 1.0)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_CAP: tl.constexpr):
    """The activations of `ad_moe.gating`, in float32."""
    if ACTIVATION == "silu":
        factor = x
        if GATE_CAP is not None:
            factor = GATE_CAP * tanh(x / GATE_CAP)
        result = factor * sigmoid(ALPHA * x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        result = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        result = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        result = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif ACTIVATION == "sigmoid":
        result = sigmoid(x)
    elif ACTIVATION == "tanh":
        result = tanh(x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        result = x
    return result


@triton.jit
def gated(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    LIMIT_ACTIVATED: tl.constexpr,
    OFFSET: tl.constexpr,
    GATE_CAP: tl.constexpr,
    UP_CAP: tl.constexpr,
):
    """`ad_moe.gating.Gating` on float32 tiles."""
    if LIMIT is not None:
        if not LIMIT_ACTIVATED:
            gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    active = activated(gate, ACTIVATION, ALPHA, GATE_CAP)
    if LIMIT is not None and LIMIT_ACTIVATED:
        active = tl.minimum(active, LIMIT)
    if UP_CAP is not None:
        up = UP_CAP * tanh(up / UP_CAP)
    return active * (up + OFFSET)
