"""Closed-form fits: the vector and the rank-r affine map that best match a shift.

Symbols
    x   what the steer reads, [tokens, d]; y the shift it should make, [tokens, e]
    C   centred second moments: C_xx = Σ (x − x̄)(x − x̄)ᵀ, C_xy likewise
    λ   ridge, relative: C_xx + λ tr(C_xx)/d · I

The best vector is ȳ. The best affine map of rank r is reduced-rank regression:
B = (C_xx + λ…)⁻¹ C_xy is the full solution, and with V the r leading eigenvectors of
C_xyᵀ B (the covariance of the fitted values) the best rank-r map is B V Vᵀ, for every
r from one decomposition. The bias is ȳ − x̄ B V Vᵀ.

Only moments are kept, so memory does not grow with the tokens, and the misfit on any
other set of tokens follows from that set's moments:

    misfit = Σ ‖y − ŷ‖² / Σ ‖y‖²
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equiv.arguments import as_choice, as_rank, as_ridge, as_tensor
from equiv.errors import ArgumentError
from equiv.steering.affine import Affine
from equiv.steering.forms import FORMS, Steering
from equiv.steering.sinks import fitted_tokens
from equiv.steering.vector import Vector

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

    @property
    def width(self) -> int:
        """Dimension d of what is read."""
        return 0 if self.x is None else len(self.x)

    def misfit(self, steering: Steering) -> float | None:
        """Share of Σ‖y‖² that the steering leaves; `None` where y is zero."""
        if self.x is None or not self.yy:
            return None
        assert self.y is not None and self.xx is not None and self.xy is not None
        if isinstance(steering, Vector):
            v = steering.vector.double()
            left = self.yy - 2 * float(v @ self.y) + self.n * float(v @ v)
            return max(left, 0.0) / self.yy
        assert isinstance(steering, Affine)
        weight = steering.down.double().T @ steering.up.double().T  # [d, e]
        b = self.y * 0 if steering.bias is None else steering.bias.double()
        cross = float((weight * self.xy).sum()) + float(b @ self.y)
        square = (
            float((weight * (self.xx @ weight)).sum())
            + 2 * float((self.x @ weight) @ b)
            + self.n * float(b @ b)
        )
        return max(self.yy - 2 * cross + square, 0.0) / self.yy


class Regression:
    """Vector and affine maps of every rank from one decomposition of the moments."""

    def __init__(self, moments: Moments, ridge: float = RIDGE) -> None:
        assert moments.x is not None and moments.y is not None
        assert moments.xx is not None and moments.xy is not None
        n, d = moments.n, moments.width
        self.mean_x, self.mean_y = moments.x / n, moments.y / n
        c_xx = moments.xx - n * torch.outer(self.mean_x, self.mean_x)
        c_xy = moments.xy - n * torch.outer(self.mean_x, self.mean_y)
        level = float(c_xx.diagonal().sum()) / d
        eye = torch.eye(d, dtype=c_xx.dtype, device=c_xx.device)
        # C_xx is a difference of sums like Σ xxᵀ, and known to their rounding only.
        rounding = torch.finfo(c_xx.dtype).eps * max(n, d)
        tiny = rounding * float(moments.xx.diagonal().sum())
        self.full = _solve(c_xx + ridge * level * eye, c_xy, tiny)
        fitted = c_xy.T @ self.full
        _, vectors = torch.linalg.eigh((fitted + fitted.T) / 2)
        self.directions = vectors.flip(1)  # leading first

    def vector(self) -> Vector:
        """The mean shift."""
        return Vector(self.mean_y)

    def affine(self, rank: int | None) -> Affine:
        """The best affine map of rank r; of full rank for `None`."""
        width = self.full.shape[1]
        kept = self.directions[:, : min(rank or width, width)]  # [e, r]
        down = (self.full @ kept).T
        return Affine(down, kept, self.mean_y - kept @ (down @ self.mean_x))

    def form(self, form: str, rank: int | None) -> Steering:
        """The fit of the form with that name."""
        return self.vector() if form == "vector" else self.affine(rank)


def _solve(matrix: Tensor, right: Tensor, tiny: float) -> Tensor:
    """(C + …)⁻¹ C_xy by its eigenvalues: directions without variance get no weight."""
    values, vectors = torch.linalg.eigh(matrix)
    inverse = torch.where(values > tiny, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right))


def fit(
    base: Tensor,
    exact: Tensor,
    *,
    form: str = "affine",
    rank: int | None = 8,
    mask: Tensor | Sequence[Any] | None = None,
    ridge: float = RIDGE,
    first_position: bool | None = None,
) -> Steering:
    """The steering of a form that best matches a shift, in closed form.

    Args:
        base: Activations that the steer reads, [batch, seq, d] or [tokens, d].
        exact: The shift to match at the same tokens, same shape.
        form: "vector" or "affine".
        rank: Rank of the affine map; `None` for full rank.
        mask: Tokens that count, [batch, seq] or [tokens]; 1 or true counts.
        ridge: Relative ridge λ added to the covariance, λ tr(C)/d.
        first_position: Whether the first token of each sequence is fitted; `None`:
            unless it is a sink (see `equiv.steering.sinks`).

    Returns:
        The fitted steering, in float64.

    Raises:
        ArgumentError: If the shapes differ, an argument is outside its set, or no token
            counts.

    Example:
        >>> h = torch.randn(50, 4, dtype=torch.float64,
        ...                 generator=torch.Generator().manual_seed(0))
        >>> shift = 2 * h + 1
        >>> steering = fit(h, shift, rank=4, ridge=0.0)
        >>> torch.allclose(steering(h), shift)
        True
    """
    form, rank, ridge = as_choice("form", form, FORMS), as_rank(rank), as_ridge(ridge)
    for name, value in (("base", base), ("exact", exact)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = getattr(value, "dtype", type(value).__name__)
            raise ArgumentError(
                f"Expected `{name}` to be a floating tensor, got {got}: convert it by "
                "`torch.as_tensor(..., dtype=torch.float64)`."
            )
    if base.shape != exact.shape or base.ndim < 2:
        raise ArgumentError(
            "Expected `base` and `exact` of one shape [batch, seq, d] or [tokens, d], "
            f"got {tuple(base.shape)} and {tuple(exact.shape)}."
        )
    mask = _as_mask(mask, base)
    for name, value in (("base", base), ("exact", exact)):
        if wrong := int((~torch.isfinite(value[mask])).sum()):
            raise ArgumentError(
                f"Expected finite numbers in `{name}`, got {wrong} NaN or infinite "
                "entries. Leave such tokens out with `mask`."
            )
    keep = fitted_tokens(mask, base, first_position=first_position)
    moments = Moments()
    moments.add(base[keep].detach(), exact[keep].detach())
    return Regression(moments, ridge).form(form, rank)


def _as_mask(mask: object, base: Tensor) -> Tensor:
    """The tokens that count, bool; every token for `None`."""
    lead = base.shape[:-1]
    if mask is None:
        made = torch.ones(lead, dtype=torch.bool, device=base.device)
    else:
        made = as_tensor("mask", mask).to(base.device, torch.bool)
    if made.shape != lead:
        raise ArgumentError(
            f"Expected a mask of shape {tuple(lead)}, got {tuple(made.shape)}."
        )
    if not bool(made.any()):
        raise ArgumentError("No token is left to fit: every token is masked.")
    return made
