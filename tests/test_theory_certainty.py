"""How sure a mean is: intervals that hold what they say, and exact tests."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

import equiv
from equiv.theory.trained.certainty import Side, difference, mean


def test_the_interval_is_students_and_holds_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0).normal(1.0, 2.0, (2000, 5))
    held = 0
    for row in draw[:500]:
        found = mean(row)
        expected = stats.ttest_1samp(row, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        held += found.low <= 1.0 <= found.high
    # 500 draws at 0.95: five standard errors are 0.05.
    assert abs(held / 500 - 0.95) < 0.05


def test_a_bootstrap_of_five_values_is_too_narrow() -> None:
    """Why it is not used: the module says how often it holds the mean."""
    draw = np.random.default_rng(1).normal(0.0, 1.0, (4000, 5))
    picks = np.random.default_rng(2).integers(0, 5, (1000, 5))
    means = draw[:, picks].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.83, abs=0.03)


def test_p_counts_every_way_to_flip_signs() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    flips = [np.mean(np.multiply(values, s)) for s in product([1, -1], repeat=5)]
    extreme = np.mean([abs(f) >= abs(np.mean(values)) - 1e-12 for f in flips])
    assert mean(values).p == pytest.approx(extreme)
    assert mean([1.0, 2.0, 3.0, 4.0, 5.0]).p == 2 / 2**5


def test_sides_follow_from_the_interval() -> None:
    found = difference([5.0, 5.2, 5.1, 5.3], [1.0, 1.0, 1.1, 1.2])
    assert found.side() is Side.ABOVE and found.side(4.0) is Side.UNDECIDED
    assert found.side(5.0) is Side.BELOW and mean([-1.0, 1.0]).side() == "undecided"
    assert mean([0.0, 0.0, 0.0]).side() is Side.UNDECIDED
    assert found.to_dict()["95 % interval"] == [found.low, found.high]


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [[1.0], [2.0]]])
def test_too_little_is_refused(values: list[float]) -> None:
    with pytest.raises(equiv.ArgumentError, match="two finite values"):
        mean(values)
    with pytest.raises(equiv.ArgumentError, match="one value per seed"):
        difference([*values, 1.0], values)
