"""Fits through the Jacobian, and what they leave: to first order, and when applied.

Symbols
    F(Δ)    what adding Δ does to the later site, F(0) = 0; J its derivative
    y       the target there

First order may mean little at the size of Δ that is needed. A fit is therefore applied
at several strengths, and J taken anew at the best: the next Δ' solves J Δ' = y − F(Δ) +
J Δ (Gauss–Newton), and is kept where it really leaves less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from equiv.steering.forms.form import Steering
from equiv.steering.jacobian.alternating import alternate, factors
from equiv.steering.jacobian.features import features
from equiv.steering.jacobian.passage import Passage
from equiv.steering.jacobian.shared import Shared, Solved, free


def fit_passage(
    passage: Passage,
    target: Tensor,
    form: str,
    rank: int | None,
    ridge: float,
    iterations: int,
) -> tuple[Steering, Solved]:
    """The steering of a form whose first-order effect comes nearest to a target.

    Args:
        passage: From where it writes to the later site.
        target: The shift wanted there, rows [kept, e].
        form: "vector", "linear" or "affine".
        rank: Of the map; `None` for full rank.
        ridge: Relative ridge, as in `equiv.fit`.
        iterations: Of LSMR, at most so many each time it is called.
    """
    gain = _gain(passage) if ridge and form != "vector" else 1.0
    known = features(passage.read[passage.kept], form, ridge, gain)
    problem = Shared(passage, target, known)
    shape = free(problem.rows, problem.width)
    found, solved = problem.solve(shape, iterations)
    whole = factors(shape.lift(found))
    if rank is not None and rank < whole.left.shape[1]:
        low = factors(shape.lift(found), rank)
        whole, turns, _ = alternate(problem, low)
        solved = Solved(
            solved.iterations + turns.iterations, turns.converged, turns.condition
        )
    return known.steering(whole.left, whole.right, whole.last), solved


def _gain(passage: Passage) -> float:
    """The mean square of J's singular values, by one random vector."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(passage.size, generator=generator).to(passage.height)
    drawn = drawn * passage.kept[:, None]
    square = passage.push(drawn).double().square().sum()
    return float(square / drawn.double().square().sum())


STRENGTHS = (1.0, 0.75, 0.5, 0.25)
# A round that gains less than this share of the error is the last.
GAIN = 1e-2

Fit = Callable[[Passage, Tensor], tuple[Steering, Solved]]


@dataclass(frozen=True)
class Rounds:
    """A steering that was fitted in rounds.

    Attributes:
        steering: At the strength taken; of strength 0 where none leaves less than none.
        strength: That strength, in the last round that was kept.
        residual: ‖J Δ − y‖ / ‖y‖ of the first fit at full strength, J at Δ = 0.
        error: ‖F(Δ) − y‖ / ‖y‖ of the steering.
        count: How many rounds were kept.
        iterations: Of the solver, in all rounds.
        converged: Whether it did in the last.
    """

    steering: Steering
    strength: float
    residual: float
    error: float
    count: int
    iterations: int
    converged: bool


def fit_rounds(passage: Passage, target: Tensor, fit: Fit, rounds: int) -> Rounds:
    """Fit, apply, and take the Jacobian anew, at most `rounds` times."""
    found, solved = fit(passage, target)
    residual = norm(passage.push(found(passage.read)) - target) / norm(target)
    strength, error = strongest(passage, found, target)
    best = Rounds(
        found.scaled(strength),
        strength,
        residual,
        error,
        int(strength > 0),
        solved.iterations,
        solved.converged,
    )
    for _ in range(rounds - 1):
        if not best.count:
            break
        delta = best.steering(passage.read)
        there = passage.around(delta)
        found, solved = fit(there, target - there.moved(delta) + there.push(delta))
        strength, error = strongest(passage, found, target)
        best = replace(best, iterations=best.iterations + solved.iterations)
        if error >= (1 - GAIN) * best.error:
            break
        best = replace(
            best,
            steering=found.scaled(strength),
            strength=strength,
            error=error,
            count=best.count + 1,
            converged=solved.converged,
        )
    return best


def strongest(
    passage: Passage, steering: Steering, target: Tensor
) -> tuple[float, float]:
    """(strength, error) at which applied steering leaves least; 0 and 1 for none."""
    delta, size = steering(passage.read), norm(target)
    tried = [(s, norm(passage.moved(delta * s) - target) / size) for s in STRENGTHS]
    finite = [one for one in tried if math.isfinite(one[1])]
    return min([*finite, (0.0, 1.0)], key=lambda one: one[1])


@dataclass(frozen=True)
class Effect:
    """How much of a target some Δ leaves, relative to the target's norm.

    Attributes:
        residual: ‖J Δ − y‖ / ‖y‖, to first order.
        error: ‖F(Δ) − F(0) − y‖ / ‖y‖, when Δ is applied.
    """

    residual: float
    error: float


def effect(passage: Passage, delta: Tensor, target: Tensor) -> Effect:
    """What a shift Δ [written, d] leaves of a target [kept, e]."""
    size = norm(target)
    residual = norm(passage.push(delta) - target) / size
    return Effect(residual, norm(passage.moved(delta) - target) / size)


def norm(rows: Tensor) -> float:
    """Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))
