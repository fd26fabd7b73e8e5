"""How the divergence between the tuned and a steered model goes to zero with t.

With f(t), g(t) the outputs of the two and d₁ = f′ − g′, d₂ = (f″ − g″)/2 at t = 0,

    KL(t) = ½ ‖t d₁ + t² d₂‖²_F (1 + O(t)),   F = diag p − p pᵀ at the base

so KL has order 2 where the steering misses something of the first-order change, d₁ ≠ 0,
and order 4 where it captures all of it exactly once.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from equiv.theory.divergence import divergence, quadratic
from equiv.theory.orders import ROUNDING, SCALES, Decay, decay
from equiv.theory.steered_runs import Path, Runs, bend, output, slope
from equiv.theory.values import Value

# Share of the first-order change that rounding alone may seem to miss.
CAPTURED = 1e-9
# The ratio of what is measured and predicted, extrapolated to t = 0, may be off by the
# O(t²) that is left of the finest two scales.
OFF = 0.05


@dataclass(frozen=True)
class Approach:
    """The divergence of a steered model from the tuned one, as the update gets small.

    Attributes:
        full: At full size, the mean over tokens.
        missed: ‖d₁‖_F / ‖f′‖_F, the share of the first-order change that is missed.
        measured: Its order; `None` where it is rounding.
        expected: The order of ½ ‖t d₁ + t² d₂‖²_F at the same scales, 4 where d₁ = 0.
        ratio: Measured over predicted as t → 0.
    """

    full: float
    missed: float
    measured: Decay | None
    expected: float
    ratio: float | None

    @property
    def captured(self) -> bool:
        """Whether all of the first-order change is there, exactly once."""
        return self.missed <= CAPTURED

    @property
    def agrees(self) -> bool:
        """Whether order and constant are those predicted, or nothing is left at all."""
        if self.measured is None or self.ratio is None:
            return self.captured
        return self.measured.near(self.expected) and abs(self.ratio - 1) <= OFF

    @property
    def order(self) -> str:
        """The measured order in words."""
        return f"{self.measured.order:.2f}" if self.measured else "none above rounding"

    def to_dict(self) -> dict[str, Value]:
        """As evidence holds it."""
        return {
            "order": self.measured and self.measured.order,
            "spread": self.measured and self.measured.spread,
            "expected order": self.expected,
            "constant over predicted": self.ratio,
            "first-order change missed": self.missed,
            "KL at full size": self.full,
        }


def approaches(
    made: Runs, tuned: Path, steered: Mapping[str, Path]
) -> dict[str, Approach]:
    """Each steered model's approach to the tuned one.

    Args:
        made: The runs that the paths are of.
        tuned: f.
        steered: g, by name.
    """
    sums = {name: _Sums() for name in steered}
    for batch in made.batches:
        base = made.counted(made.base[batch], batch)
        seen = {t: made.counted(output(tuned, batch, t), batch) for t in (1.0, *SCALES)}
        first, second = (made.counted(f(tuned, batch), batch) for f in (slope, bend))
        for name, path in steered.items():
            own = sums[name]
            own.tokens += len(base)
            rounding = quadratic(ROUNDING * base, base, made.classes)
            own.floor += float(rounding.sum())
            for t, wanted in seen.items():
                got = made.counted(output(path, batch, t), batch)
                _add(own.measured, t, divergence(wanted, got, made.classes))
            one = first - made.counted(slope(path, batch), batch)
            two = (second - made.counted(bend(path, batch), batch)) / 2
            own.missed += float(quadratic(one, base, made.classes).sum())
            own.whole += float(quadratic(first, base, made.classes).sum())
            for t in SCALES:
                change = t * one + t**2 * two
                _add(own.predicted, t, quadratic(change, base, made.classes))
    return {name: own.judged() for name, own in sums.items()}


class _Sums:
    """Sums over tokens for one steered model."""

    def __init__(self) -> None:
        self.measured: dict[float, float] = {}
        self.predicted: dict[float, float] = {}
        self.missed = self.whole = self.floor = 0.0
        self.tokens = 0

    def judged(self) -> Approach:
        small = {t: self.measured[t] for t in SCALES}
        measured = decay(small, self.floor)
        missed = (self.missed / self.whole) ** 0.5 if self.whole else 0.0
        predicted = decay(self.predicted)
        expected = 4.0 if missed <= CAPTURED or not predicted else predicted.order
        ratio = None
        if measured is not None:
            coarse, fine = measured.scales[-2:]
            ratios = [self.measured[t] / self.predicted[t] for t in (coarse, fine)]
            ratio = 2 * ratios[1] - ratios[0]
        full = self.measured[1.0] / self.tokens
        return Approach(full, missed, measured, expected, ratio)


def _add(sums: dict[float, float], t: float, figures: Tensor) -> None:
    sums[t] = sums.get(t, 0.0) + float(figures.sum())
