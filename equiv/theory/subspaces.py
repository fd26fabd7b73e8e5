"""Column spaces of matrices: bases, what is off them, how far two overlap."""

import torch
from torch import Tensor

# Of the largest singular value: what is smaller is rounding, not a direction.
NOTHING = 1e-10


def basis(columns: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix, [d, rank]; none if it is zero.

    Example:
        >>> basis(torch.zeros(3, 2)).shape, basis(torch.ones(3, 2).double()).shape
        (torch.Size([3, 0]), torch.Size([3, 1]))
    """
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > NOTHING * sizes[0]] if sizes[0] > 0 else left[:, :0]


def projector(columns: Tensor) -> Tensor:
    """1 − V Vᵀ off the columns of a matrix, [d, d]."""
    spanned = basis(columns)
    eye = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
    return eye - spanned @ spanned.T


def overlap(first: Tensor, second: Tensor) -> float:
    """‖Q₁ᵀ Q₂‖²/r: the mean squared cosine of the angles between two column spaces.

    r is the smaller of their dimensions. Two random spaces, of r and of k ≥ r
    dimensions, overlap by k/d on average.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> overlap(eye[:, :2], eye[:, 1:3])  # one direction of two is shared
        0.5
    """
    a, b = basis(first), basis(second)
    return float((a.T @ b).square().sum()) / max(min(a.shape[1], b.shape[1]), 1)
