"""Sums and products of weight differences, which stay in factors while that is less.

Symbols: W [out, in] a weight, A = up down + diag(scale) the linear part of a steer.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from equiv.steering.weights.parts import Parts
from equiv.update.low_rank import Delta, LowRank


def as_dense(delta: Delta) -> Tensor:
    """The difference as one float64 matrix."""
    return delta.dense() if isinstance(delta, LowRank) else delta.double()


def transposed(delta: Delta) -> Delta:
    """The transpose."""
    if isinstance(delta, LowRank):
        return LowRank(delta.right.T, delta.left.T)
    return delta.T


def total(deltas: Iterable[Delta | None]) -> Delta | None:
    """The sum; `None` is zero.

    Example:
        >>> one = LowRank(torch.ones(4, 1), torch.ones(1, 4))
        >>> total([one, None]).shape, type(total([one] * 3)).__name__
        ((4, 4), 'Tensor')
    """
    found = [delta for delta in deltas if delta is not None]
    if not found:
        return None
    low = [delta for delta in found if isinstance(delta, LowRank)]
    out, inside = found[0].shape
    if len(low) == len(found) and _is_less(sum(_rank(d) for d in low), out, inside):
        return LowRank(
            torch.cat([d.left for d in low], 1), torch.cat([d.right for d in low], 0)
        )
    return sum((as_dense(delta) for delta in found[1:]), as_dense(found[0]))


def of_reader(weight: Tensor, parts: Parts) -> Delta | None:
    """W A: what a layer with weight W makes of what is added to its input."""
    low = columns = None
    if parts.up is not None and parts.down is not None:
        low = LowRank(weight @ parts.up, parts.down)
    if parts.scale is not None:
        chosen = parts.scale.nonzero().flatten()
        if _is_less(len(chosen), *weight.shape):
            columns = LowRank(
                weight[:, chosen] * parts.scale[chosen], _rows(chosen, weight)
            )
        else:
            columns = weight * parts.scale
    return total([low, columns])


def of_writer(weight: Tensor, parts: Parts) -> Delta | None:
    """A W: what is added to the output of a layer with weight W, by what it is."""
    found = of_reader(weight.T, parts.transposed)
    return None if found is None else transposed(found)


def _rows(chosen: Tensor, weight: Tensor) -> Tensor:
    """Rows of the identity that pick entries of the input."""
    rows = weight.new_zeros(len(chosen), weight.shape[1])
    rows[torch.arange(len(chosen), device=weight.device), chosen] = 1
    return rows


def _rank(delta: LowRank) -> int:
    return delta.left.shape[1]


def _is_less(rank: int, out: int, inside: int) -> bool:
    """Whether factors hold fewer numbers than the matrix."""
    return rank * (out + inside) < out * inside
