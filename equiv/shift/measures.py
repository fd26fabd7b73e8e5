"""Norms and angles over the tokens that count, summed in float64 whatever the dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor


def counted(activation: Tensor, mask: Tensor) -> Tensor:
    """The activation at the tokens that count, [tokens, features].

    An activation without an axis of tokens (a pooled output, say) counts whole.
    """
    if has_tokens(activation, mask) and not bool(mask.all()):
        activation = activation[mask]
    return activation.reshape(-1, activation.shape[-1] if activation.ndim else 1)


def has_tokens(activation: Tensor, mask: Tensor) -> bool:
    """Whether the leading axes are the mask's, with features after them.

    Example:
        >>> mask = torch.ones(2, 5, dtype=torch.bool)
        >>> has_tokens(torch.ones(2, 5, 3), mask), has_tokens(torch.ones(2, 5), mask)
        (True, False)
    """
    leading = activation.shape[: mask.ndim] == mask.shape
    return leading and activation.ndim > mask.ndim


def squares(rows: Tensor) -> float:
    """Σ x² over all entries, summed in float64 whatever the dtype."""
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2


@dataclass
class Square:
    """A running sum of squares; `norm` is its root."""

    total: float = 0.0

    def add(self, rows: Tensor) -> None:
        """Add the squares of all entries."""
        self.total += squares(rows)

    @property
    def norm(self) -> float:
        """Frobenius norm of everything added."""
        return self.total**0.5


@dataclass
class Comparison:
    """A claimed shift against the exact one, over all tokens added so far.

    Symbols: δ the exact shift, δ¹ the claimed one; the remainder is δ − δ¹.
    """

    exact: float = 0.0
    claimed: float = 0.0
    remainder: float = 0.0
    product: float = 0.0

    def add(self, exact: Tensor, claimed: Tensor) -> None:
        """Add tokens [tokens, features] of both shifts."""
        parts = squares(exact), squares(claimed), squares(exact - claimed)
        self.exact += parts[0]
        self.claimed += parts[1]
        self.remainder += parts[2]
        # ‖a − b‖² = ‖a‖² + ‖b‖² − 2⟨a, b⟩: one pass over the tokens less.
        self.product += (parts[0] + parts[1] - parts[2]) / 2

    @property
    def relative_remainder(self) -> float | None:
        """‖δ − δ¹‖ / ‖δ‖; `None` where there is no shift."""
        return (self.remainder / self.exact) ** 0.5 if self.exact else None

    @property
    def cosine(self) -> float | None:
        """⟨δ, δ¹⟩ / (‖δ‖ ‖δ¹‖); `None` where either is zero."""
        size = (self.exact * self.claimed) ** 0.5
        return max(-1.0, min(1.0, self.product / size)) if size else None


def apart(one: float | None, other: float | None) -> float:
    """How far two figures are from each other, as a share of the larger.

    Example:
        >>> apart(0.2, 0.5), apart(0.0, None)
        (0.6, 0.0)
    """
    larger = max(one or 0.0, other or 0.0)
    return abs((one or 0.0) - (other or 0.0)) / larger if larger else 0.0


def ratio(part: float, whole: float) -> float | None:
    """Part / whole, or `None` when the whole is zero."""
    return part / whole if whole else None
