"""Closed-form fits from moments: vector, linear, affine, LoReFT and heads.

Symbols
    x   what the steer reads, [tokens, d]; y the shift it should make, [tokens, e]
    C   centred second moments: C_xx = Σ (x − x̄)(x − x̄)ᵀ, C_xy likewise
    λ   ridge, relative: C_xx + λ tr(C_xx)/d · I

The best vector is ȳ. The best affine map of rank r is reduced-rank regression:
B = (C_xx + λ…)⁻¹ C_xy is the full solution, and with V the r leading eigenvectors of
C_xyᵀ B (the covariance of the fitted values) the best rank-r map is B V Vᵀ, for every
r from one decomposition. The bias is ȳ − x̄ B V Vᵀ.

A linear map is the same with moments that are not centred. A LoReFT is an affine map
whose bias lies in the columns of `up`: the best one is the linear map of [x; 1]. Per
head and coordinate, scale and offset are the regression of y_i on x_i alone.

Only moments are kept, so memory does not grow with the tokens, and the misfit on any
other set of tokens follows from that set's moments:

    misfit = Σ ‖y − ŷ‖² / Σ ‖y‖²
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.errors import ArgumentError
from equiv.steering.forms.affine import Affine
from equiv.steering.forms.form import Steering
from equiv.steering.forms.heads import Heads
from equiv.steering.forms.loreft import LoReFT
from equiv.steering.forms.vector import Vector

# One thousandth of the mean variance: fits on few tokens stay bounded, and with
# enough tokens the misfit changes in the fourth digit.
RIDGE = 1e-3
# Below this many tokens per dimension held-out fits did not generalise.
ENOUGH_TOKENS = 8.0


@dataclass
class Moments:
    """Sums that fits and misfits need: of 1, x, y, xxᵀ, xyᵀ and ‖y‖², in float64."""

    n: int = 0
    x: Tensor | None = None  # [d]
    y: Tensor | None = None  # [e]
    xx: Tensor | None = None  # [d, d]
    xy: Tensor | None = None  # [d, e]
    yy: float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens: x [tokens, d], y [tokens, e]."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.yy += float(y.square().sum())
        sums = x.sum(0), y.sum(0), x.T @ x, x.T @ y
        if self.x is None:
            self.x, self.y, self.xx, self.xy = sums
            return
        assert self.y is not None and self.xx is not None and self.xy is not None
        self.x += sums[0]
        self.y += sums[1]
        self.xx += sums[2]
        self.xy += sums[3]

    def plus(self, other: "Moments") -> "Moments":
        """The moments of both sets of tokens together."""
        if self.x is None or other.x is None:
            return other if self.x is None else self
        assert self.y is not None and self.xx is not None and self.xy is not None
        assert other.y is not None and other.xx is not None and other.xy is not None
        return Moments(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    @property
    def width(self) -> int:
        """Dimension d of what is read."""
        return 0 if self.x is None else len(self.x)

    def misfit(self, steering: Steering) -> float | None:
        """Share of Σ‖y‖² that the steering leaves; `None` where y is zero.

        The steering has to be affine in what it reads.
        """
        if self.x is None or not self.yy:
            return None
        assert self.y is not None and self.xx is not None and self.xy is not None
        if isinstance(steering, Vector):
            v = steering.vector.double()
            left = self.yy - 2 * float(v @ self.y) + self.n * float(v @ v)
            return max(left, 0.0) / self.yy
        weight, b = _as_matrix(steering, len(self.y))  # [d, e], [e]
        cross = float((weight * self.xy).sum()) + float(b @ self.y)
        square = (
            float((weight * (self.xx @ weight)).sum())
            + 2 * float((self.x @ weight) @ b)
            + self.n * float(b @ b)
        )
        return max(self.yy - 2 * cross + square, 0.0) / self.yy


def _as_matrix(steering: Steering, e: int) -> tuple[Tensor, Tensor]:
    """(map [d, e], bias [e]) of a steer that is affine in what it reads, float64."""
    if isinstance(steering, LoReFT):
        steering = steering.affine()
    if isinstance(steering, Heads):
        scale, offset = steering.parts()
        zero = torch.zeros(e, dtype=torch.float64)
        slope, bias = (zero if p is None else p.double() for p in (scale, offset))
        return torch.diag(slope), bias
    assert isinstance(steering, Affine)
    weight = steering.down.double().T @ steering.up.double().T
    if steering.bias is None:
        return weight, weight.new_zeros(e)
    return weight, steering.bias.double()


class Regression:
    """Every form that has a closed-form fit, from the moments of one set of tokens.

    The vector and the affine maps of every rank share one decomposition.
    """

    def __init__(self, moments: Moments, ridge: float = RIDGE) -> None:
        assert moments.x is not None and moments.y is not None
        assert moments.xx is not None and moments.xy is not None
        n, d = moments.n, moments.width
        self.moments, self.ridge = moments, ridge
        self.mean_x, self.mean_y = moments.x / n, moments.y / n
        self.c_xx = moments.xx - n * torch.outer(self.mean_x, self.mean_x)
        self.c_xy = moments.xy - n * torch.outer(self.mean_x, self.mean_y)
        # C_xx is a difference of sums like Σ xxᵀ, and known to their rounding only.
        rounding = torch.finfo(self.c_xx.dtype).eps * max(n, d)
        self.tiny = rounding * float(moments.xx.diagonal().sum())
        self.full, self.directions = reduced_rank(
            self.c_xx, self.c_xy, self._penalty(self.c_xx), self.tiny
        )

    def _penalty(self, c_xx: Tensor) -> Tensor:
        level = float(c_xx.diagonal().sum()) / len(c_xx)
        return torch.full((len(c_xx),), self.ridge * level).to(c_xx)

    def vector(self) -> Vector:
        """The mean shift."""
        return Vector(self.mean_y)

    def affine(self, rank: int | None) -> Affine:
        """The best affine map of rank r; of full rank for `None`."""
        width = self.full.shape[1]
        kept = self.directions[:, : min(rank or width, width)]  # [e, r]
        down = (self.full @ kept).T
        return Affine(down, kept, self.mean_y - kept @ (down @ self.mean_x))

    def linear(self, rank: int | None) -> Affine:
        """The best linear map of rank r, without a bias."""
        xx, xy = self.moments.xx, self.moments.xy
        assert xx is not None and xy is not None
        full, directions = reduced_rank(xx, xy, self._penalty(xx), self.tiny)
        width = full.shape[1]
        kept = directions[:, : min(rank or width, width)]
        return Affine((full @ kept).T, kept)

    def loreft(self, rank: int | None) -> LoReFT:
        """The best LoReFT of rank r: the best linear map of [x; 1].

        Raises:
            ArgumentError: If what is written has another width than what is read.
        """
        m, d = self.moments, self.moments.width
        assert m.x is not None and m.y is not None
        assert m.xx is not None and m.xy is not None
        if len(m.y) != d:
            raise ArgumentError(
                f"A LoReFT writes what it reads: expected one width, got {d} and "
                f"{len(m.y)}. Use an affine map."
            )
        corner = torch.tensor([[float(m.n)]]).to(m.xx)
        xx = torch.cat(
            [torch.cat([m.xx, m.x[:, None]], 1), torch.cat([m.x[None], corner], 1)]
        )
        xy = torch.cat([m.xy, m.y[None]])
        # As for the affine map, the bias is not penalised.
        penalty = torch.cat([self._penalty(self.c_xx), corner.new_zeros(1)])
        full, directions = reduced_rank(xx, xy, penalty, self.tiny)
        kept = directions[:, : min(rank or d, d)]
        down, rotation = (full @ kept).T, kept.T
        return LoReFT(rotation, down[:, :d] + rotation, down[:, d])

    def heads(self, num_heads: int) -> Heads:
        """The best scale and offset of each coordinate, by head.

        Raises:
            ArgumentError: If the widths are not one, or do not divide into heads.
        """
        d, e = self.moments.width, len(self.mean_y)
        if d != e or d % num_heads:
            raise ArgumentError(
                f"Expected {num_heads} heads of one width, read and written alike, got "
                f"{d} coordinates read and {e} written. Heads are steered at "
                "attn_heads."
            )
        variance, shared = self.c_xx.diagonal(), self.c_xy.diagonal()
        level = variance + self._penalty(self.c_xx)
        known = level > self.tiny
        scale = torch.where(known, shared / level.where(known, level + 1), 0.0)
        offset = self.mean_y - scale * self.mean_x
        return Heads(offset.reshape(num_heads, -1), scale.reshape(num_heads, -1))

    def form(
        self, form: str, rank: int | None, num_heads: int | None = None
    ) -> Steering:
        """The fit of the form with that name."""
        if form == "vector":
            return self.vector()
        if form == "heads":
            return self.heads(num_heads or 1)
        ranked = {"linear": self.linear, "affine": self.affine, "loreft": self.loreft}
        return ranked[form](rank)


def reduced_rank(
    xx: Tensor, xy: Tensor, penalty: Tensor, tiny: float
) -> tuple[Tensor, Tensor]:
    """(full solution B, directions of the fitted values, leading first).

    Args:
        xx: Second moments of what is read, [d, d].
        xy: Second moments with the target, [d, e].
        penalty: Ridge on the diagonal, [d].
        tiny: Size of the rounding in the moments.
    """
    full = _solve(xx + torch.diag(penalty), xy, tiny)
    fitted = xy.T @ full
    _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
    return full, vectors.flip(1)


def _solve(matrix: Tensor, right: Tensor, tiny: float) -> Tensor:
    """(C + …)⁻¹ C_xy by its eigenvalues: directions without variance get no weight."""
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > tiny, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right))
