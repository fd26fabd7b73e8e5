"""The radius: up to what size of update is first order good enough?

The radius at tolerance τ is the largest t such that every probed t′ ≤ t has a relative
remainder ≤ τ. τ = 10 % is a convention. It is found by bisection over the grid
t = 2^(k/16), whose neighbours are 4.4 % apart, starting from the scales of the Taylor
test; all rows are bisected together, so a scale that several rows ask for is run once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from equiv.model.stages import StagedModel
from equiv.shift.calculus import Curve, RowKey, Selection, scopes
from equiv.shift.measures import Comparison, counted
from equiv.shift.propagate import Point, propagate
from equiv.shift.results import Radius
from equiv.update.update import Update

TOLERANCE = 0.1
STEPS_PER_OCTAVE = 16
LARGEST = 8.0

# (row, whether the derivative is taken at the midpoint)
Question = tuple[RowKey, bool]


@dataclass
class _Bracket:
    """Largest grid index known to be within the tolerance, smallest known outside."""

    probed: dict[int, float] = field(default_factory=dict)

    def edges(self, tolerance: float) -> tuple[int | None, int | None]:
        inside: int | None = None
        for k in sorted(self.probed):
            if self.probed[k] > tolerance:
                return inside, k
            inside = k
        return inside, None

    def next(self, tolerance: float) -> int | None:
        """The grid index to probe next; `None` when done."""
        inside, outside = self.edges(tolerance)
        if outside is None:
            top = max(self.probed) + STEPS_PER_OCTAVE
            return top if _t(top) <= LARGEST else None
        low = outside - 2 * STEPS_PER_OCTAVE if inside is None else inside
        if inside is None and min(self.probed) <= _FINEST:
            return None
        return None if outside - low <= 1 else (low + outside) // 2


_FINEST = -10 * STEPS_PER_OCTAVE


def _t(k: int) -> float:
    return 2.0 ** (k / STEPS_PER_OCTAVE)


def radii(
    cut: StagedModel,
    update: Update,
    curves: Mapping[RowKey, Curve],
    *,
    low: Sequence[str],
    selection: Selection,
    midpoint: bool,
    tolerance: float = TOLERANCE,
) -> dict[Question, Radius]:
    """Radii at every row that has a shift, at the base and at the midpoint."""
    brackets = _start(curves, midpoint)
    while True:
        wanted = {q: b.next(tolerance) for q, b in brackets.items()}
        asked = {q: k for q, k in wanted.items() if k is not None}
        if not asked:
            break
        measured = _measure(cut, update, asked, low=low, selection=selection)
        for question, remainder in measured.items():
            brackets[question].probed[asked[question]] = remainder
    return {q: _radius(q, b, curves[q[0]], tolerance) for q, b in brackets.items()}


def _start(curves: Mapping[RowKey, Curve], midpoint: bool) -> dict[Question, _Bracket]:
    """Brackets from the Taylor test's own scales."""
    brackets: dict[Question, _Bracket] = {}
    for key, curve in curves.items():
        points = [p for p in curve.points() if p.shift > 0]
        if not points:
            continue
        grid = {p.scale: round(STEPS_PER_OCTAVE * math.log2(p.scale)) for p in points}
        base = {grid[p.scale]: p.remainder / p.shift for p in points}
        brackets[key, False] = _Bracket(base)
        if midpoint:
            middle = {
                grid[p.scale]: p.remainder_midpoint / p.shift
                for p in points
                if p.remainder_midpoint is not None
            }
            brackets[key, True] = _Bracket(middle)
    return brackets


def _measure(
    cut: StagedModel,
    update: Update,
    asked: Mapping[Question, int],
    *,
    low: Sequence[str],
    selection: Selection,
) -> dict[Question, float]:
    """Relative remainders at the grid scales asked for, in one pass."""
    values = {_t(k) for k in asked.values()}
    tangents = {0.0} | {_t(k) / 2 for (_, mid), k in asked.items() if mid}
    points = tuple(Point(s, s in tangents) for s in sorted(values | tangents))
    local = any(key[2].value == "local" for key, _ in asked)
    sums: dict[Question, Comparison] = {}
    for _, _, traces in propagate(cut, update, points, low=low, local=local):
        for trace in traces:
            mask = cut.batches[trace.batch].mask
            for key, f, d in scopes(trace, selection):
                for mid in (False, True):
                    k = asked.get((key, mid))
                    if k is None or not d:
                        continue
                    site, t = key[1], _t(k)
                    base = counted(f[0.0][site], mask)
                    slope = counted(d[t / 2 if mid else 0.0][site], mask)
                    sums.setdefault((key, mid), Comparison()).add(
                        counted(f[t][site], mask) - base, t * slope
                    )
    return {q: c.relative_remainder or 0.0 for q, c in sums.items()}


def _radius(
    question: Question, bracket: _Bracket, curve: Curve, tolerance: float
) -> Radius:
    _, mid = question
    inside, outside = bracket.edges(tolerance)
    predicted = (
        curve.predicted_radius_midpoint(tolerance)
        if mid
        else curve.predicted_radius(tolerance)
    )
    value = 0.0 if inside is None else _t(inside)
    return Radius(value, outside is None, predicted, tolerance)
