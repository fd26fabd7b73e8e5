"""Shifts that many tokens share, as features of what is read times numbers to find.

Symbols
    x       what the steer reads, rows [tokens, d]
    Δ       Φ Θ, with features Φ = [whitened x, 1/√n] and Θ [k + 1, e] to be found
    λ       ridge, relative; g² the gain, of what is written on what is wanted

With x̄ and C the mean and centred second moments of x, C = Q diag(c) Qᵀ and
λ' = λ tr(C)/d, the whitened x is (x − x̄) Q (c + λ')^-½. A ridge of g² λ' on the map M
itself is then a penalty ‖p ∘ Θ‖² with p = g (λ'/(c + λ'))^½, and 0 for the constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.vector import Vector

SHARED = ("vector", "linear", "affine")


@dataclass(frozen=True)
class Features:
    """Φ for any activations that are read, and the penalty on Θ.

    Attributes:
        form: "vector" (the constant alone), "linear" (no constant) or "affine".
        mean: x̄, [d]; zero for "linear".
        white: Q (c + λ')^-½, [d, k]; k = 0 for "vector".
        one: 1/√n; zero for "linear".
        penalty: p, [k + 1].
    """

    form: str
    mean: Tensor
    white: Tensor
    one: float
    penalty: Tensor

    def of(self, read: Tensor) -> Tensor:
        """Φ [tokens, k + 1], in the dtype of what is read."""
        white = (read.double() - self.mean) @ self.white
        ones = white.new_full((len(white), 1), self.one)
        return torch.cat([white, ones], 1).to(read.dtype)

    def steering(self, left: Tensor, right: Tensor, last: Tensor) -> Steering:
        """The steering that Θ = [left right; last] stands for, in float64."""
        constant = last.double() * self.one
        if self.form == "vector":
            return Vector(constant)
        down, up = (self.white @ left.double()).T, right.double().T
        if self.form == "linear":
            return Affine(down, up)
        return Affine(down, up, constant - up @ (down @ self.mean))


def features(
    read: Tensor, form: str, ridge: float = 0.0, gain: float = 1.0
) -> Features:
    """The features of a form.

    Args:
        read: What the steer reads at the tokens that count, [tokens, d].
        form: One of `SHARED`.
        ridge: λ.
        gain: g².

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> phi = features(x, "affine").of(x)
        >>> torch.allclose(phi.T @ phi, torch.eye(4), atol=1e-5)
        True
    """
    x = read.double()
    n, d = x.shape
    if form == "vector":
        return Features(
            form, x.new_zeros(d), x.new_zeros(d, 0), n**-0.5, x.new_zeros(1)
        )
    linear = form == "linear"
    mean = x.new_zeros(d) if linear else x.mean(0)
    moments = (x - mean).T @ (x - mean)
    level = ridge * float(moments.diagonal().sum()) / d
    values, vectors = torch.linalg.eigh(moments)
    # Sums of squares are known to their rounding only.
    tiny = torch.finfo(x.dtype).eps * max(n, d) * float(x.square().sum())
    seen = values + level > tiny
    values = values[seen].clamp_min(0) + level
    penalty = torch.cat([(gain * level / values).sqrt(), x.new_zeros(1)])
    white = vectors[:, seen] * values.rsqrt()
    return Features(form, mean, white, 0.0 if linear else n**-0.5, penalty)
