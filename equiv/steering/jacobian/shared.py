"""One shift for many tokens whose effect at a later site fits best, by SciPy's LSMR.

Symbols as in `features`: Δ = Φ Θ, penalty p; J the network between the two sites and y
the shift wanted at the later one. With Θ a linear function of some numbers,

    minimise  ‖J Φ Θ − y‖² + ‖p ∘ Θ‖²

over these numbers, by products with J and Jᵀ. Where J is the identity this is the
regression of `fits`, and Φ is such that LSMR needs one step for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equiv.steering.jacobian.features import Features
from equiv.steering.jacobian.passage import Passage

# What LSMR is asked for: products in float32 are not known much better.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_OUT_OF_STEPS = 7  # LSMR's `istop` at its limit of iterations


@dataclass(frozen=True)
class Solved:
    """What LSMR says of its answer.

    Attributes:
        iterations: How many it made.
        converged: Whether it reached the tolerance.
        condition: Its estimate of the condition number, of the right order.
    """

    iterations: int
    converged: bool
    condition: float


@dataclass(frozen=True)
class Shape:
    """How Θ depends on the numbers that are looked for: linearly.

    Attributes:
        size: How many numbers.
        lift: Numbers → Θ.
        drop: Its transpose.
    """

    size: int
    lift: Callable[[Tensor], Tensor]
    drop: Callable[[Tensor], Tensor]


def free(rows: int, width: int) -> Shape:
    """Every entry of Θ [rows, width] is free."""
    return Shape(
        rows * width, lambda v: v.reshape(rows, width), lambda theta: theta.reshape(-1)
    )


class Shared:
    """The least-squares problem of one shared shift.

    Args:
        passage: J, from where the steer writes to the later site.
        target: y, rows [kept, e].
        known: Φ and p.
    """

    def __init__(self, passage: Passage, target: Tensor, known: Features) -> None:
        self.passage, self.target = passage, target
        self.phi = known.of(passage.read)
        self.penalty = known.penalty[:, None].to(self.phi)
        self.rows, self.width = self.phi.shape[1], passage.size[1]

    def value(self, theta: Tensor) -> float:
        """The sum that is to be small."""
        left = self.passage.push(self.phi @ theta) - self.target
        parts = (left, self.penalty * theta)
        return sum(float(part.double().square().sum()) for part in parts)

    def solve(
        self, shape: Shape, iterations: int, start: Tensor | None = None
    ) -> tuple[Tensor, Solved]:
        """The best numbers of a shape.

        Args:
            shape: What Θ may be.
            iterations: At most so many.
            start: Numbers to start from; zero for `None`.
        """
        from scipy.sparse.linalg import lsmr

        right = np.zeros(self.target.numel() + self.rows * self.width)
        right[: self.target.numel()] = _array(self.target)
        tolerance = TOLERANCE[self.phi.dtype]
        found, stop, made, *_, condition, _ = lsmr(
            self._operator(shape),
            right,
            atol=tolerance,
            btol=tolerance,
            conlim=0,
            maxiter=iterations,
            x0=None if start is None else _array(start),
        )
        solved = Solved(made, stop != _OUT_OF_STEPS, float(condition))
        return self._tensor(found), solved

    def _operator(self, shape: Shape) -> Any:
        from scipy.sparse.linalg import LinearOperator

        split = self.target.numel()

        def forth(numbers: np.ndarray) -> np.ndarray:
            theta = shape.lift(self._tensor(numbers))
            seen = self.passage.push(self.phi @ theta)
            return np.concatenate([_array(seen), _array(self.penalty * theta)])

        def back(numbers: np.ndarray) -> np.ndarray:
            rows = self._tensor(numbers)
            seen = self.passage.pull(rows[:split].reshape(self.target.shape))
            below = rows[split:].reshape(self.rows, self.width)
            return _array(shape.drop(self.phi.T @ seen + self.penalty * below))

        size = split + self.rows * self.width, shape.size
        made: Any = LinearOperator
        return made(size, matvec=forth, rmatvec=back, dtype=np.float64)

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ravel(numbers)).to(self.phi)


def _array(numbers: Tensor) -> np.ndarray:
    return numbers.double().cpu().numpy().ravel()
