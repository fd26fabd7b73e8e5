"""How sure a mean over a few seeds is, the same way in every claim about training.

A study has one number per seed and few seeds, five by default. A difference between
two ways of training is taken seed by seed, on the same base and data, so that what the
seeds have in common drops out.

The interval is Student's. A bootstrap over five values is too narrow: for normal values
its 95 % percentile interval holds the mean about 83 times in a hundred, Student's 95
times. Beside it stands the p of the exact sign-flip test, which assumes only that each
difference is as likely one way as the other; with n seeds it cannot be below 2 / 2ⁿ,
1/16 for five. Verdicts follow from the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from equiv.errors import ArgumentError
from equiv.report.numbers import figure
from equiv.theory.values import Value

CONFIDENCE = 0.95


class Side(StrEnum):
    """Where a mean lies, as far as its interval tells."""

    ABOVE = "above"
    BELOW = "below"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, and how sure it is.

    Attributes:
        mean: Of the values.
        low: Lower end of Student's 95 % interval.
        high: Upper end.
        p: Of the two-sided exact sign-flip test of mean 0.
        n: How many values.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int

    def side(self, of: float = 0.0) -> Side:
        """Above a level if all of the interval is, below likewise, else undecided."""
        if self.low > of:
            return Side.ABOVE
        return Side.BELOW if self.high < of else Side.UNDECIDED

    def to_dict(self) -> dict[str, Value]:
        """As evidence of a claim."""
        return {
            "mean": self.mean,
            "95 % interval": [self.low, self.high],
            "sign-flip p": self.p,
            "n": self.n,
        }

    def __str__(self) -> str:
        ends = f"{figure(self.low, 2)} to {figure(self.high, 2)}"
        return f"{figure(self.mean)} (95 % interval {ends}, n = {self.n})"


def mean(values: Sequence[float]) -> Mean:
    """The mean over seeds, with its interval.

    Raises:
        ArgumentError: If there are fewer than two values, or one is not finite.

    Example:
        >>> found = mean([0.9, 1.1, 1.0, 1.2, 0.8])
        >>> print(found, found.side().value, found.p)
        1 (95 % interval 0.8 to 1.2, n = 5) above 0.0625
    """
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ArgumentError(f"Expected two finite values or more, got {list(values)}.")
    centre, n = float(x.mean()), len(x)
    reach = float(stats.sem(x)) * float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    flipped = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=2**n, vectorized=True
    )
    return Mean(centre, centre - reach, centre + reach, float(flipped.pvalue), n)


def difference(first: Sequence[float], second: Sequence[float]) -> Mean:
    """The mean of first − second, seed by seed.

    Raises:
        ArgumentError: If they are not of one length.

    Example:
        >>> difference([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]).mean
        2.0
    """
    if len(first) != len(second):
        raise ArgumentError(
            f"Expected one value per seed in both, got {len(first)} and {len(second)}."
        )
    return mean([a - b for a, b in zip(first, second, strict=True)])
