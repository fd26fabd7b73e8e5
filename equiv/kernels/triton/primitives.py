"""What the kernels share: rounding, products, and the activations.

Triton's interpreter, in which the kernels run on a CPU, differs from a GPU in three
ways, which `INTERPRETED` makes up for: it multiplies bfloat16 as bit patterns, cuts
float32 off to bfloat16 instead of rounding, and has no library of device functions.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret

ACTIVATION_NUMBERS = {
    "identity": 0,
    "relu": 1,
    "silu": 2,
    "gelu": 3,
    "gelu_tanh": 4,
    "tanh": 5,
}


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 in another dtype, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        up = tl.where(x != x, (bits >> 16) | 0x40, up)  # a NaN stays one
        return up.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Total + a b, summed in float32.

    In the interpreter as a sum over an axis: NumPy's own product sums a row in an order
    that depends on where in the tile it stands, which a GPU does not do.
    """
    if INTERPRETED:
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        return total + tl.sum(wide_a[:, :, None] * wide_b[None, :, :], 1)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """By exp, which cancels near 0: there the odd series, whose next term is 1e-9."""
    x2 = x * x
    series = 0.13333333333 + x2 * (-0.05396825397 + x2 * 0.02186948854)
    near = x * (1.0 + x2 * (-0.33333333333 + x2 * series))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.25, near, far)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """φ(z), by number."""
    if ACTIVATION == 0:
        return z
    elif ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, z)  # keeps a NaN, which `maximum` may not
    elif ACTIVATION == 2:
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == 3:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 4:
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return 0.5 * z * (1.0 + tanh(u))
    else:
        return tanh(z)


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """φ′(z), by number."""
    if ACTIVATION == 0:
        return tl.full(z.shape, 1.0, tl.float32)
    elif ACTIVATION == 1:
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == 3:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == 4:
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * z * z)
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    else:
        t = tanh(z)
        return 1.0 - t * t
