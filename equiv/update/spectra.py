"""Singular values and inner products of differences; factors are never made dense."""

from collections.abc import Mapping

import torch
from torch import Tensor

from equiv.errors import UpdateError, UpdateMismatchError
from equiv.update.entries import shape_at
from equiv.update.low_rank import Delta, LowRank


def matrix_at(deltas: Mapping[str, Delta], name: str) -> Delta:
    """One entry that is a matrix.

    Raises:
        UpdateMismatchError: If there is no such entry.
        UpdateError: If it is no matrix.
    """
    if name not in deltas:
        raise UpdateMismatchError(
            f"The update has no `{name}`. `print(update)` shows what it has."
        )
    if len(shape := shape_at(deltas, name)) != 2:
        raise UpdateError(
            f"Expected a matrix, but `{name}` has shape {shape}: it has no singular "
            "values."
        )
    return deltas[name]


def singular_values(delta: Delta) -> Tensor:
    """Singular values of a matrix in float64, from the largest down.

    Of factors of rank r there are at most r: those of the r × r matrix between the
    two orthonormal bases that QR finds.

    Example:
        >>> delta = LowRank(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]]))
        >>> singular_values(delta)
        tensor([10.], dtype=torch.float64)
    """
    if not isinstance(delta, LowRank):
        return torch.linalg.svdvals(delta.detach().double())
    left = torch.linalg.qr(delta.left.double(), mode="r").R
    right = torch.linalg.qr(delta.right.double().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def stable_rank(values: Tensor) -> float:
    """‖Δ‖²_F / ‖Δ‖²₂ from singular values: how many directions carry a matrix.

    Between 1 and the rank; 0 for a matrix of zeros.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
        2.0
    """
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0


def inner(a: Delta, b: Delta) -> float:
    """Sum of the products of the entries of two differences of one shape."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left, right = a.left.double().T @ b.left.double(), a.right.double()
        return float((left * (right @ b.right.double().T)).sum())
    if isinstance(a, LowRank):
        a, b = b, a
    dense = a.double()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(b, LowRank):
        return float(((b.left.double().T @ dense) * b.right.double()).sum())
    return float((dense * b.double()).sum())
