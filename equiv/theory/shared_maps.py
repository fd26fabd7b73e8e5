"""One map for many tokens: the best fixed vector, affine map of rank r, affine map.

Symbols
    x       what a steer reads, [tokens, d]
    y       what it is to write, [tokens, e]
    A       derivative of what is wanted by what is written, one per token

Least squares by the singular values of x, without a ridge: these maps are to show what
a form can do, not to be used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VECTOR = 0  # the rank of a map that reads nothing


@dataclass(frozen=True)
class SharedMap:
    """X ↦ x M + v.

    Attributes:
        matrix: M, [d, e].
        bias: v, [e].
    """

    matrix: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """What it writes, [tokens, e]."""
        return x @ self.matrix + self.bias


def best_map(x: Tensor, y: Tensor, rank: int | None) -> SharedMap:
    """The map with the least ‖x M + v − y‖.

    Args:
        x: [tokens, d], float64.
        y: [tokens, e], float64.
        rank: Largest rank of M; `None` for any, 0 for a fixed vector.

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
        >>> found = best_map(x, 3 * x + 1, None)
        >>> round(float(found.matrix), 9), round(float(found.bias), 9)
        (3.0, 1.0)
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    if rank == VECTOR:
        return SharedMap(x.new_zeros(x.shape[1], y.shape[1]), mean_y)
    matrix = torch.linalg.pinv(x - mean_x) @ (y - mean_y)
    if rank is not None:
        right = torch.linalg.svd((x - mean_x) @ matrix, full_matrices=False).Vh
        matrix = matrix @ right[:rank].T @ right[:rank]
    return SharedMap(matrix, mean_y - mean_x @ matrix)


def misfit(found: SharedMap, x: Tensor, y: Tensor) -> float:
    """What a map leaves: ‖x M + v − y‖² / ‖y‖²."""
    return float((found(x) - y).square().sum() / y.square().sum())


def with_one(x: Tensor) -> Tensor:
    """[x 1], [tokens, d + 1]: what an affine map reads."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def misfit_through(slopes: Tensor, reads: Tensor, y: Tensor) -> float:
    """What the best linear map of what is read leaves of y, where it acts through A.

    Args:
        slopes: A, [tokens, e, d].
        reads: [tokens, k]: [x 1] for an affine map, 1 for a vector.
        y: [tokens, e].
    """
    # A Mᵀ x is linear in the entries of M.
    columns = torch.einsum("ned,nk->nekd", slopes, reads).flatten(2).flatten(0, 1)
    right = y.flatten()[:, None]
    numbers = torch.linalg.lstsq(columns, right, driver="gelsd").solution
    return float((columns @ numbers - right).square().sum() / right.square().sum())


def affine_rank(x: Tensor) -> int:
    """How many of the first rows are affinely independent, before one is not.

    Example:
        >>> affine_rank(torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 1]]).double())
        2
    """
    known = with_one(x)
    low, high = 1, min(known.shape)
    while low < high:
        middle = (low + high + 1) // 2
        if int(torch.linalg.matrix_rank(known[:middle])) == middle:
            low = middle
        else:
            high = middle - 1
    return low
