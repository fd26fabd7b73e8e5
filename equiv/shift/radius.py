"""The radius: up to what size of update is first order good enough?

The radius at tolerance τ is the largest t such that every probed t′ ≤ t has a relative
remainder ≤ τ. τ = 10 % is a convention. It is bracketed by bisection over the grid
t = 2^(k/4), on all tokens; it starts from the remainder at full size (t = 1), so the
two never contradict each other, and from the radius that the next term of the series
predicts. Inside the bracket, a factor of 1.19 wide, the remainder is taken as a power
of t, which the tests hold to 2.5 % of the crossing found by brute force.

All rows are bracketed together, each over the roundest scales first, so that they ask
for the same ones: each is run once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product

from torch import Tensor

from equiv.model.batches import first_unmasked
from equiv.model.stages import StagedModel
from equiv.shift.calculus import Curve, RowKey, Selection, scopes
from equiv.shift.flips import Flips
from equiv.shift.measures import Comparison, apart, counted
from equiv.shift.propagate import propagate
from equiv.shift.results import Radius, Scope
from equiv.shift.table import FullSize
from equiv.shift.traces import Point, Trace
from equiv.update.update import Update

TOLERANCE = 0.1
STEPS_PER_OCTAVE = 4
LARGEST = 8.0
# How far below t = 1 a remainder is looked for that is larger there than at t = 1.
DOUBTED_OCTAVES = 4

# A part of the tokens whose remainder at full size differs by more than this share of
# the larger from that over all tokens is told apart, and gets a radius of its own.
APART = 0.1


class Part(StrEnum):
    """The tokens that a radius is about."""

    ALL = "all"
    REST = "without first positions"
    UNFLIPPED = "unflipped"  # whose experts the full update leaves


# (row, whether the derivative is taken at the midpoint, tokens)
Question = tuple[RowKey, bool, Part]


@dataclass
class _Bracket:
    """Largest grid index known to be within the tolerance, smallest known outside."""

    probed: dict[int, float] = field(default_factory=dict)
    predicted: float | None = None

    def edges(self, tolerance: float) -> tuple[int | None, int | None]:
        inside: int | None = None
        for k in sorted(self.probed):
            if not self.probed[k] <= tolerance:  # also for NaN
                return inside, k
            inside = k
        return inside, None

    def next(self, tolerance: float) -> int | None:
        """The grid index to probe next; `None` when done."""
        inside, outside = self.edges(tolerance)
        if outside is None:
            for k in self._doubted():
                if k not in self.probed:
                    return k
            top = max(self.probed) + STEPS_PER_OCTAVE
            return top if _t(top) <= LARGEST else None
        if inside is None:
            return self._below(outside)
        if outside - inside <= 1:
            return None
        return _roundest(inside, outside)

    def _doubted(self) -> range:
        """Octaves below t = 1 that the prediction puts outside, all within as it is."""
        if not self.predicted or self.predicted >= 1:
            return range(0)
        lowest = max(math.floor(math.log2(self.predicted)), -DOUBTED_OCTAVES)
        return range(
            -STEPS_PER_OCTAVE, lowest * STEPS_PER_OCTAVE - 1, -STEPS_PER_OCTAVE
        )

    def _below(self, outside: int) -> int | None:
        """A power of two that should be within, by the prediction or by going down."""
        if outside <= _FINEST:
            return None
        lower = min(2 * outside, -STEPS_PER_OCTAVE)
        if len(self.probed) == 1 and self.predicted and self.predicted < 1:
            lower = math.floor(math.log2(self.predicted)) * STEPS_PER_OCTAVE
        return max(_FINEST, lower)

    def radius(self, tolerance: float) -> Radius:
        """Where the remainder crosses the tolerance, as a power of t in between."""
        inside, outside = self.edges(tolerance)
        value = 0.0 if inside is None else _t(inside)
        if inside is not None and outside is not None:
            low, high = self.probed[inside], self.probed[outside]
            if low > 0 and math.isfinite(high):
                # log r is linear in log t between the two edges.
                share = math.log(tolerance / low) / math.log(high / low)
                value = _t(inside + share * (outside - inside))
        return Radius(value, outside is None, self.predicted, tolerance)


_FINEST = -16 * STEPS_PER_OCTAVE


def _roundest(low: int, high: int) -> int:
    """Between two grid indices, the one that most brackets will ask for.

    Example:
        >>> _roundest(-24, 0), _roundest(-16, 0), _roundest(-4, -1)
        (-12, -8, -2)
    """
    step = STEPS_PER_OCTAVE
    while not (found := range((low // step + 1) * step, high, step)):
        step //= 2
    return found[len(found) // 2]


def _t(k: float) -> float:
    return 2.0 ** (k / STEPS_PER_OCTAVE)


def radii(
    cut: StagedModel,
    update: Update,
    full: Mapping[RowKey, FullSize],
    curves: Mapping[RowKey, Curve],
    *,
    low: Sequence[str],
    selection: Selection,
    midpoint: bool,
    flips: Flips,
    tolerance: float = TOLERANCE,
    derivative: str = "forward",
) -> dict[Question, Radius]:
    """Radii at every row that has a shift, at the base and at the midpoint.

    Parts of the tokens have their own at propagated rows where they are told apart.

    Args:
        cut: The model cut into stages, with all tokens.
        update: An update that fits it.
        full: The rows at full size, measured on the same tokens.
        curves: The Taylor curves, for the predictions.
        low: Names whose low-rank factors are applied beside the weight.
        selection: Which layers and sites are rows.
        midpoint: Whether the radius at the midpoint is wanted too.
        flips: The tokens that the full update sends to other experts.
        tolerance: τ.
        derivative: As for `propagate`.
    """
    brackets = _start(full, curves, midpoint, tolerance)
    while True:
        wanted = {q: b.next(tolerance) for q, b in brackets.items()}
        asked = {q: k for q, k in wanted.items() if k is not None}
        if not asked:
            break
        measured = _measure(cut, update, asked, low, selection, flips, derivative)
        for question, remainder in measured.items():
            brackets[question].probed[asked[question]] = remainder
    return {q: b.radius(tolerance) for q, b in brackets.items()}


def _start(
    full: Mapping[RowKey, FullSize],
    curves: Mapping[RowKey, Curve],
    midpoint: bool,
    tolerance: float,
) -> dict[Question, _Bracket]:
    """One known scale each, t = 1, and the prediction."""
    brackets: dict[Question, _Bracket] = {}
    for key, whole in full.items():
        for part, row, curve in _parts(key, whole, curves[key]):
            base, middle = row.first.relative_remainder, row.midpoint.relative_remainder
            if base is not None:
                predicted = curve and _finite(curve.predicted_radius(tolerance))
                brackets[key, False, part] = _Bracket({0: base}, predicted)
            if midpoint and middle is not None:
                predicted = curve and _finite(
                    curve.predicted_radius_midpoint(tolerance)
                )
                brackets[key, True, part] = _Bracket({0: middle}, predicted)
    return brackets


def _parts(
    key: RowKey, whole: FullSize, curve: Curve
) -> Iterator[tuple[Part, FullSize, Curve | None]]:
    """A row's tokens, and the parts of them to be told apart, with their curves."""
    yield Part.ALL, whole, curve
    if key[2] is not Scope.PROPAGATED:
        return
    if whole.rest is not None and _told_apart(whole, whole.rest):
        yield Part.REST, whole.rest, None
    if whole.unflipped is not None and _told_apart(whole, whole.unflipped):
        yield Part.UNFLIPPED, whole.unflipped, curve.unflipped


def _told_apart(whole: FullSize, part: FullSize) -> bool:
    pairs = ((whole.first, part.first), (whole.midpoint, part.midpoint))
    return any(
        apart(one.relative_remainder, other.relative_remainder) > APART
        for one, other in pairs
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _measure(
    cut: StagedModel,
    update: Update,
    asked: Mapping[Question, int],
    low: Sequence[str],
    selection: Selection,
    flips: Flips,
    derivative: str,
) -> dict[Question, float]:
    """Relative remainders at the grid scales asked for, in one pass."""
    points, local = (
        _points([(k, mid) for (key, mid, _), k in asked.items() if key[2] is scope])
        for scope in (Scope.PROPAGATED, Scope.LOCAL)
    )
    sums: dict[Question, Comparison] = {}
    passes = propagate(cut, update, points, low=low, local=local, derivative=derivative)
    for _, _, traces in passes:
        for trace in traces:
            tokens = _tokens(trace, cut.mask(trace.stage, trace.batch), flips)
            for key, f, d in scopes(trace, selection):
                for mid, (part, mask) in product((False, True), tokens.items()):
                    k = asked.get((key, mid, part))
                    if k is None or not d:  # not asked, or nothing moves here
                        continue
                    site, t = key[1], _t(k)
                    base = counted(f[0.0][site], mask)
                    slope = counted(d[t / 2 if mid else 0.0][site], mask)
                    sums.setdefault((key, mid, part), Comparison()).add(
                        counted(f[t][site], mask) - base, t * slope
                    )
    return {q: _relative(c) for q, c in sums.items()}


def _tokens(trace: Trace, mask: Tensor, flips: Flips) -> dict[Part, Tensor]:
    """The tokens of each part, bool like the mask."""
    found = {Part.ALL: mask, Part.REST: mask & ~first_unmasked(mask)}
    kept = flips.kept(trace, mask)
    return found if kept is None else {**found, Part.UNFLIPPED: kept}


def _relative(found: Comparison) -> float:
    """The relative remainder; infinite where a shift was claimed and none came."""
    if found.relative_remainder is not None:
        return found.relative_remainder
    return math.inf if found.claimed else 0.0


def _points(wanted: Sequence[tuple[int, bool]]) -> tuple[Point, ...]:
    """What has to be run for (grid index, whether at the midpoint)."""
    values = {_t(k) for k, _ in wanted}
    tangents = {_t(k) / 2 if mid else 0.0 for k, mid in wanted}
    return tuple(Point(s, s in tangents) for s in sorted(values | tangents))
