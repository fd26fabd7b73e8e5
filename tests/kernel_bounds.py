"""How far a batched shift may be from exact, component by component, before it is run.

Symbols: u the unit roundoff of what is computed in, u_o of the result's dtype, u_w of
the weights'; everything else in float64, from the inputs as rounded.

A sum of n products, in any order, is off by γ Σ|·| with γ = n u: always, and in all but
2 n exp(−λ²/2) of cases with γ = λ √n u, if roundings are independent and centred
(Higham and Mary 2019). With λ = 8 that is one in 10¹⁰ at n = 10⁴. In half precision
the result's own rounding hides either; in float32 the smaller is what tells a bug.

    z = D x + b                 |δz| ≤ γ(d + 1) (|D||x| + |b|)
    a = s φ(z)                  |δa| ≤ |s| (L |δz| + e) + 2 u |a|, e what φ itself costs
    a as two halves             |δa| + u_w² |a| + the smallest number of that dtype
    y = base + Uᵀ a             |δy| ≤ |U|ᵀ |δa| + γ(r + 1) (|U|ᵀ |a| + |base|)
    rounded                     |δy| + u_o (|y| + |δy|) + the smallest number
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.kernels.activations import ACTIVATIONS

LIPSCHITZ = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13}  # 1 for the others
_LAMBDA = 8.0


@dataclass(frozen=True)
class Case:
    """Arguments of a low-rank shift, rows flat, one steer and strength per row."""

    h: Tensor  # [rows, d]
    down: Tensor  # [n, r, d]
    up: Tensor  # [n, r, d]
    bias: Tensor | None  # [n, r]
    index: Tensor  # [rows]
    scale: Tensor | None  # [rows]
    activation: str


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Half the distance of the smallest numbers."""
    return torch.finfo(dtype).smallest_normal * unit(dtype)


def gamma(n: int, u: float) -> float:
    """The factor of a sum of n products."""
    return min(n, _LAMBDA * math.sqrt(n)) * u


def exact(case: Case) -> Tensor:
    """Row by row in float64."""
    rows = []
    for t, number in enumerate(case.index.tolist()):
        x = case.h[t].double()
        if number >= 0:
            z = case.down[number].double() @ x
            if case.bias is not None:
                z = z + case.bias[number].double()
            a = ACTIVATIONS[case.activation](z)
            strength = 1.0 if case.scale is None else case.scale[t].double()
            x = x + strength * (a @ case.up[number].double())
        rows.append(x)
    return torch.stack(rows) if rows else case.h.double()


def bound(case: Case, *, halves: bool = False) -> Tensor:
    """The largest error, [rows, d]; zero where there is no steer.

    Args:
        case: The arguments.
        halves: Whether a goes into the second product as two numbers of the weights'
            dtype, as in the kernel with weights in half precision.
    """
    u = unit(torch.promote_types(case.h.dtype, torch.float32))
    out, weights = case.h.dtype, case.down.dtype
    y, found = exact(case), torch.zeros(case.h.shape, dtype=torch.float64)
    (_, r, d), steep = case.down.shape, LIPSCHITZ.get(case.activation, 1.0)
    for t, number in enumerate(case.index.tolist()):
        if number < 0:
            continue
        x, down, up = (
            v.double() for v in (case.h[t], case.down[number], case.up[number])
        )
        b = torch.zeros(r).double() if case.bias is None else case.bias[number].double()
        s = 1.0 if case.scale is None else abs(float(case.scale[t]))
        z = down @ x + b
        dz = gamma(d + 1, u) * (down.abs() @ x.abs() + b.abs())
        a = ACTIVATIONS[case.activation](z).abs()
        da = s * (steep * dz + _own(case.activation, z, a, u)) + 2 * u * s * a
        terms = r
        if halves:
            da, terms = da + unit(weights) ** 2 * s * a + smallest(weights), 2 * r
        size = s * a @ up.abs()
        off = da @ up.abs() + gamma(terms + 1, u) * (size + x.abs())
        found[t] = off + unit(out) * (y[t].abs() + off) + smallest(out)
    return found


def _own(activation: str, z: Tensor, a: Tensor, u: float) -> Tensor:
    """What evaluating φ costs: 1 + erf and 1 + tanh cancel, so there it is of z."""
    if activation in ("identity", "relu"):
        return torch.zeros_like(z)
    return 8 * u * (z.abs() if activation.startswith("gelu") else a)


def vector_bound(h: Tensor, v: Tensor, scale: Tensor | float) -> Tensor:
    """Of h + scale · v: a product, a sum, a rounding."""
    u = unit(torch.promote_types(h.dtype, torch.float32))
    shift = (torch.as_tensor(scale).double() * v.double()).abs()
    y = (h.double() + torch.as_tensor(scale).double() * v.double()).abs()
    off = u * shift + u * (y + u * shift)
    return off + unit(h.dtype) * (y + off) + smallest(h.dtype)
