"""Weight differences as maps of a layer's input: ΔW = W M, as far as rounding tells.

A difference is known to the rounding of what it came from. Stored weights of dtype
epsilon ε are off by up to ε/2 of each entry, factors by ε of their product; what is
below that is taken for zero. On top comes what a least-squares solution in float64
leaves: 2⁻³⁶ of the difference, at condition numbers of W up to some 10⁴.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from equiv.steering.weights.deltas import as_dense
from equiv.update.low_rank import Delta, LowRank, norm_of

_SOLVED = 2.0**-36


def noise_of(delta: Delta, weight: Tensor, dtype: torch.dtype) -> float:
    """Frobenius norm of the rounding in a difference.

    Args:
        delta: The difference, in the shape of the weight.
        weight: The weight before it, in float64.
        dtype: What it is stored in.
    """
    eps = torch.finfo(dtype).eps
    if isinstance(delta, LowRank):
        sizes = [
            torch.linalg.vector_norm(p.double()) for p in (delta.left, delta.right)
        ]
        return eps * float(sizes[0] * sizes[1])
    return eps / 2 * float(torch.linalg.vector_norm(weight + delta))


def in_factors(delta: Delta, noise: float) -> LowRank:
    """A difference in factors: its own, or those of its rank.

    Singular values are dropped where noise could have made them: independent errors of
    total norm s on an m × n matrix have a spectral norm of about s (1/√m + 1/√n). Four
    times that, since what was rounded was computed before, in float64 at best.

    Example:
        >>> in_factors(torch.ones(4, 3, dtype=torch.float64), 1e-15).left.shape
        torch.Size([4, 1])
    """
    if isinstance(delta, LowRank):
        return delta
    dense = delta.double()
    out, inside = dense.shape
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    rank = int((values > 4 * noise * (out**-0.5 + inside**-0.5)).sum())
    if rank < min(out, inside):
        return LowRank(left[:, :rank] * values[:rank], right[:rank])
    # Of full rank: one factor is the matrix itself.
    eye = torch.eye(min(out, inside)).to(dense)
    return LowRank(dense, eye) if inside <= out else LowRank(eye, dense)


def reading(weight: Tensor, delta: LowRank, noise: float) -> tuple[LowRank, float]:
    """M with W M = ΔW, in factors.

    Args:
        weight: W, [out, in] in float64.
        delta: ΔW, of the same shape.
        noise: Norm of the rounding in it.

    Returns:
        The best M [in, in], and the share of ΔW that it leaves, 0 if only rounding.
    """
    up = least_squares(weight, delta.left.double())
    missing = LowRank(weight @ up - delta.left.double(), delta.right)
    return LowRank(up, delta.right), _share(norm_of(missing), norm_of(delta), noise)


def reading_fixed(weight: Tensor, bias: Tensor, noise: float) -> tuple[Tensor, float]:
    """The best v for W v = Δb, and the share of Δb that it leaves."""
    found = least_squares(weight, bias[:, None])[:, 0]
    return found, _share(norm_of(weight @ found - bias), norm_of(bias), noise)


def _share(left: float, size: float, noise: float) -> float:
    return 0.0 if left <= noise + _SOLVED * size else left / size


def stacked(deltas: Sequence[Delta | None], weights: Sequence[Tensor]) -> Delta | None:
    """Differences of layers with one input, one above the other; `None` is zero.

    Those in factors stay so if they have the input's factor in common.
    """
    given = [delta for delta in deltas if delta is not None]
    if not given:
        return None
    rights = [delta.right for delta in given if isinstance(delta, LowRank)]
    common = len(rights) == len(given) and all(r.equal(rights[0]) for r in rights)
    pairs = zip(deltas, weights, strict=True)
    if common:
        lefts = [
            weight.new_zeros(len(weight), len(rights[0]))
            if not isinstance(delta, LowRank)
            else delta.left.double()
            for delta, weight in pairs
        ]
        return LowRank(torch.cat(lefts), rights[0])
    return torch.cat(
        [
            torch.zeros_like(w) if delta is None else as_dense(delta)
            for delta, w in pairs
        ]
    )


def least_squares(weight: Tensor, wanted: Tensor) -> Tensor:
    """The smallest X that minimises ‖W X − wanted‖."""
    # On the CPU, where the solver knows deficient ranks.
    found = torch.linalg.lstsq(weight.cpu(), wanted.cpu(), driver="gelsd")
    return found.solution.to(weight.device)
