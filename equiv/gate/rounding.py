"""How far apart two right results may lie: bounds that follow from the storage dtype.

Symbols
    D           dtype in which the actual weights are stored
    u           unit roundoff of D, half its eps: 2⁻⁸ for bfloat16, 2⁻²⁴ for float32
    e = W + ΔW  what a right merge stands for, in float64
    ulp(e)      distance of neighbours of e in D

A right merge rounds the sum once, at most ½ ulp(e) ≤ u|e|, and may have rounded ΔW up
to three times before that: the product of its factors, the scaling, and the product
cast to D. The product itself, ΔW = LR of rank r, is summed in float32 at least (u₃₂),
with an error of at most (r + 2) u₃₂ |L||R|, which is more than u₃₂|ΔW| where its terms
cancel. So

    |actual − e| ≤ ½ ulp(|e| + b) + b,    b = 3u|ΔW| + (r + 2) u₃₂ |L||R|

which without cancellation lies within u(|W| + 4|ΔW|).
"""

import torch
from torch import Tensor

from equiv.update.low_rank import Delta, LowRank

ROUNDINGS_OF_UPDATE = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to the nearest.

    Example:
        >>> unit_roundoff(torch.bfloat16) == 2**-8
        True
    """
    return torch.finfo(dtype).eps / 2


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest absolute error of rounding each |value| (float64) to the nearest.

    To half precision torch rounds by way of float32, which adds that rounding.

    Example:
        >>> half_ulp(torch.tensor([1.0, 1.9, 2.0]).double(), torch.float32) * 2**24
        tensor([1., 1., 2.], dtype=torch.float64)
    """
    info = torch.finfo(dtype)
    # |value| = m · 2^exponent, ½ <= m < 1; below `tiny` the spacing stops shrinking.
    exponent = torch.frexp(value.abs().clamp_min(info.tiny)).exponent
    error = torch.ldexp(torch.full_like(value, info.eps / 4), exponent)
    single = torch.finfo(torch.float32).eps / 2
    return error + single * value.abs() if info.bits < 32 else error


def weight_bound(
    exact: Tensor,
    update: Tensor | None,
    dtype: torch.dtype,
    product: Tensor | float = 0.0,
) -> Tensor:
    """Largest |actual − exact| of a right merge, element by element, in float64.

    Args:
        exact: W + ΔW, float64.
        update: ΔW, same shape; `None` where the weight is only stored.
        dtype: In which the actual weight is stored.
        product: Error of the product that ΔW is; see `product_error`.
    """
    if update is None:
        return half_ulp(exact, dtype)
    before = ROUNDINGS_OF_UPDATE * unit_roundoff(dtype) * update.abs() + product
    return half_ulp(exact.abs() + before, dtype) + before


def product_error(delta: Delta | None) -> Tensor | float:
    """Largest error of the product of factors, summed in float32; 0 without factors."""
    if not isinstance(delta, LowRank):
        return 0.0
    rank = delta.left.shape[1]
    sizes = delta.left.double().abs() @ delta.right.double().abs()
    return (rank + 2) * unit_roundoff(torch.float32) * sizes
