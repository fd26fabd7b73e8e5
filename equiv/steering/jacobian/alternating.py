"""The best shared map of low rank, by alternating least squares.

Θ = [L R; last] with L [k, r] and R [r, e]. With L given the best R and constant are a
linear problem, and with R given the best L and constant. They take turns, each solved
from where it is, with the other made orthonormal. The start is the best map of full
rank, cut to r directions; where J is the identity that is the answer (reduced-rank
regression). A turn is kept only if it makes the sum smaller.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.steering.jacobian.shared import Shape, Shared, Solved

# At most so many turns, of so many iterations of LSMR for each factor, and no more once
# a turn gains less than this share of the sum. More iterations a turn gain little: the
# other factor is about to change.
TURNS, STEPS, GAIN = 6, 15, 1e-2


@dataclass(frozen=True)
class Factors:
    """Θ = [left right; last].

    Attributes:
        left: L, [k, r], orthonormal columns.
        right: R, [r, e].
        last: [e].
    """

    left: Tensor
    right: Tensor
    last: Tensor

    @property
    def theta(self) -> Tensor:
        """Θ, [k + 1, e]."""
        return torch.cat([self.left @ self.right, self.last[None]])


def factors(theta: Tensor, rank: int | None = None) -> Factors:
    """A full Θ cut to its leading directions; all of them for `None`."""
    left, values, right = torch.linalg.svd(theta[:-1], full_matrices=False)
    return Factors(left[:, :rank], values[:rank, None] * right[:rank], theta[-1])


def alternate(
    problem: Shared, start: Factors
) -> tuple[Factors, Solved, tuple[float, ...]]:
    """Improve factors in turns.

    Returns:
        The factors; the iterations of all calls of LSMR, whether the turns ended before
        the last with its own calls converged, and the worst condition; and the sum
        before the first and after every turn that was kept.
    """
    best, values, calls, ended = start, [problem.value(start.theta)], [], False
    for _ in range(TURNS):
        found, made = _turn(problem, best)
        value = problem.value(found.theta)
        calls += made
        ended = not values[-1] - value > GAIN * values[-1]
        if value < values[-1]:
            best = found
            values.append(value)
        if ended:
            break
    solved = Solved(
        sum(call.iterations for call in calls),
        ended and all(call.converged for call in calls[-2:]),
        max(call.condition for call in calls),
    )
    return best, solved, tuple(values)


def _turn(problem: Shared, now: Factors) -> tuple[Factors, list[Solved]]:
    """R with L given, then L with R given."""
    rank, rows = now.left.shape[1], len(now.left)
    start = torch.cat([now.right.reshape(-1), now.last])
    shape = _with_left(now.left, problem.width)
    found, first = problem.solve(shape, STEPS, start)
    right, last = found[: -problem.width].reshape(rank, -1), found[-problem.width :]
    basis, triangle = torch.linalg.qr(right.T)  # L R = (L Tᵀ) Bᵀ
    start = torch.cat([(now.left @ triangle.T).reshape(-1), last])
    found, second = problem.solve(_with_right(basis.T, rows), STEPS, start)
    left, last = found[: rows * rank].reshape(rows, rank), found[rows * rank :]
    unit, triangle = torch.linalg.qr(left)
    return Factors(unit, triangle @ basis.T, last), [first, second]


def _with_left(left: Tensor, width: int) -> Shape:
    """[L R; last] with L given; the numbers are R and last."""
    rank = left.shape[1]

    def lift(numbers: Tensor) -> Tensor:
        rows = numbers.reshape(rank + 1, width)
        return torch.cat([left @ rows[:-1], rows[-1:]])

    def drop(theta: Tensor) -> Tensor:
        return torch.cat([left.T @ theta[:-1], theta[-1:]]).reshape(-1)

    return Shape((rank + 1) * width, lift, drop)


def _with_right(right: Tensor, rows: int) -> Shape:
    """[L R; last] with R given; the numbers are L and last."""
    rank, width = right.shape
    inner = rows * rank

    def lift(numbers: Tensor) -> Tensor:
        left, last = numbers[:inner].reshape(rows, rank), numbers[inner:]
        return torch.cat([left @ right, last[None]])

    def drop(theta: Tensor) -> Tensor:
        return torch.cat([(theta[:-1] @ right.T).reshape(-1), theta[-1]])

    return Shape(inner + width, lift, drop)
