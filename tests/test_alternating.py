"""Alternating least squares for low rank, on dense Jacobians."""

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import witness
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equiv.steering.jacobian import alternating
from equiv.steering.jacobian.alternating import Factors, alternate, factors
from equiv.steering.jacobian.features import features
from equiv.steering.jacobian.shared import Shared, free
from equiv.testing.strategies import seeds


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Dense:
    """A passage whose Jacobian is one matrix for each token."""

    def __init__(self, seed: int, tokens: int = 30, d: int = 4, e: int = 5) -> None:
        self.read = draw(seed, tokens, d) @ draw(seed + 1, d, d)
        self.j = draw(seed + 2, e, d) + 0.7 * draw(seed + 3, tokens, e, d)
        self.size = (tokens, d)

    def push(self, delta: Tensor) -> Tensor:
        return torch.einsum("ned,nd->ne", self.j, delta)

    def pull(self, rows: Tensor) -> Tensor:
        return torch.einsum("ned,ne->nd", self.j, rows)


@settings(max_examples=15 * witness.SWEEP)
@given(seeds(), st.integers(1, 3), st.sampled_from([0.0, 1e-2]))
def test_turns_of_low_rank_lower_the_sum(seed: int, rank: int, ridge: float) -> None:
    """From the full map cut to its rank, and in the end to where the slope is zero."""
    passage: Any = Dense(seed)
    y = torch.tanh(passage.push(passage.read)) + 0.1 * draw(seed + 4, 30, 5)
    problem = Shared(passage, y, features(passage.read, "affine", ridge))
    full, _ = problem.solve(free(problem.rows, problem.width), 500)
    start = factors(full.reshape(problem.rows, -1), rank)

    def summed(left: Tensor, right: Tensor, last: Tensor) -> Tensor:
        theta = torch.cat([left @ right, last[None]])
        missing = passage.push(problem.phi @ theta) - y
        return missing.square().sum() + (problem.penalty * theta).square().sum()

    def parts(found: Factors) -> tuple[Tensor, ...]:
        return found.left, found.right, found.last

    def slopes(found: Factors) -> list[float]:
        """Of the sum by each part, as a share of it."""
        moving = [part.clone().requires_grad_() for part in parts(found)]
        value = summed(*moving)
        value.backward()
        return [
            float(m.grad.norm() * m.detach().norm() / value.detach())  # pyright: ignore
            for m in moving
        ]

    best, solved, values = alternate(problem, start)
    assert values[0] == pytest.approx(float(summed(*parts(start))), rel=1e-9)
    assert values[-1] == pytest.approx(float(summed(*parts(best))), rel=1e-9)
    assert all(b < a for a, b in pairwise(values))
    assert solved.iterations > 0 and best.right.shape == (rank, 4)
    with patch.multiple(alternating, TURNS=1, STEPS=500):
        once, _, values = alternate(problem, start)
    if len(values) > 1:
        left, _, constant = slopes(once)  # solved for last, R being given
        assert max(left, constant) < 1e-6
    with patch.multiple(alternating, TURNS=400, GAIN=1e-10):
        last, *_ = alternate(problem, best)
    assert max(slopes(last)) < 1e-3
