"""Taylor test: how fast does the first-order remainder shrink with the update?

Symbols
    t               scale of the update; t = 0 is the base model
    f(t), f′(t)     an activation and its derivative in t
    base remainder      ‖f(t) − f(0) − t f′(0)‖    = t²/2 ‖f″‖ + O(t³)
    midpoint remainder  ‖f(t) − f(0) − t f′(t/2)‖  = t³/24 ‖f‴‖ + O(t⁴)

Halving t divides the first by 4 and the second by 8: orders 2 and 3. A wrong
derivative leaves a term linear in t: order 1. At a kink (ReLU) order 2 may fail, and
that is a true statement about the model.

The order is read off the finest two scales in the largest window of halving scales
that lies above the rounding floor and below the radius, where higher terms still
count: on 4000 random SiLU layers the smallest order over t = 0.1 … 0.0125 fell below
1.9 in 5 % of the cases, at the finest pair of 2⁻⁶ … 2⁻¹⁰ in none.

The floor is measured, not assumed: at t₀ = 2⁻²⁶ the true remainder is below t₀² = 2⁻⁵²
of the shift's own scale, so what is seen there is rounding.
"""

import math
from collections.abc import Sequence

from equiv.shift.results import Order, TaylorPoint, Verdict

# Remainders are probed at t = 1 … 2⁻¹⁰, derivatives at half of each for the midpoint.
SCALES = tuple(2.0**-k for k in range(0, 11))
NOISE_SCALE = 2.0**-26
# A remainder 16 times the rounding noise has an order good to log2(17/15) = 0.18 in
# the worst case and to about 0.02 for noise that is not aligned with it.
ABOVE_NOISE = 16.0
MIN_ORDER = 1.9
MIN_ORDER_MIDPOINT = 2.8
# Above this share of the shift the higher terms of the series are no longer small.
ASYMPTOTIC = 0.1

_KINK = (
    "the derivative is wrong, or the model is not smooth here (a ReLU changes sign, or "
    "a routing decision flips)"
)


def order_of(
    points: Sequence[TaylorPoint],
    floor: float,
    shift: float,
    *,
    midpoint: bool = False,
) -> Order:
    """The order of a remainder, with its verdict.

    Args:
        points: Remainders, scales descending by halves.
        floor: Rounding noise in an activation difference, an absolute norm.
        shift: Norm of the first-order shift at t = 1.
        midpoint: Judge the midpoint remainder (third order) instead of the base's.

    Returns:
        `holds`, `exact`, `fails`, `inconclusive` or `not applicable`, with the reason.

    Example:
        >>> points = [TaylorPoint(t, t, t**2, None) for t in (0.1, 0.05, 0.025)]
        >>> order_of(points, floor=1e-12, shift=1.0).verdict.value
        'holds'
        >>> wrong = [TaylorPoint(t, t, 0.05 * t, None) for t in (0.1, 0.05, 0.025)]
        >>> order_of(wrong, floor=1e-12, shift=1.0).verdict.value
        'fails'
    """
    bad = [p.scale for p in points if not math.isfinite(p.remainder + p.shift)]
    if bad or not math.isfinite(shift):
        where = f"t = {min(bad):.2g}" if bad else "the base"
        return Order(
            Verdict.FAILS,
            f"the activations or their derivative are not finite at {where}: the "
            "update drives the model out of its range",
        )
    if shift == 0 and all(point.shift == 0 for point in points):
        return Order(Verdict.NOT_APPLICABLE, "no shift here")
    visible = ABOVE_NOISE * floor
    if max(point.shift for point in points) <= visible:
        return Order(
            Verdict.INCONCLUSIVE,
            "the update is too small to be seen above rounding; use float64, or a "
            "larger update",
        )
    remainders = {p.scale: _remainder(p, midpoint) for p in points}
    shifts = {p.scale: p.shift for p in points}
    above = [t for t in sorted(remainders) if remainders[t] > visible]
    if not above:
        return Order(Verdict.EXACT, "the remainder is zero to rounding at every scale")
    window = _window(above, remainders, shifts)
    if len(window) < 2:
        return _undecided(above, remainders, shifts, midpoint)
    finest, next_ = window[0], window[1]
    order = math.log2(remainders[next_] / remainders[finest])
    least = MIN_ORDER_MIDPOINT if midpoint else MIN_ORDER
    span = (window[0], window[-1])
    if order >= least:
        return Order(Verdict.HOLDS, f"order {order:.2f}", order, span)
    return Order(
        Verdict.FAILS,
        f"order {order:.2f}, expected ≥ {least}: the remainder shrinks too slowly; "
        + _KINK,
        order,
        span,
    )


def _remainder(point: TaylorPoint, midpoint: bool) -> float:
    if not midpoint:
        return point.remainder
    assert point.remainder_midpoint is not None
    return point.remainder_midpoint


def _window(
    above: Sequence[float], remainders: dict[float, float], shifts: dict[float, float]
) -> list[float]:
    """Scales above the floor and in the asymptotic regime, finest first, by halves."""
    small = [t for t in above if remainders[t] <= ASYMPTOTIC * shifts[t]]
    window: list[float] = []
    for t in small:
        if window and not math.isclose(t, 2 * window[-1]):
            break
        window.append(t)
    return window


def _undecided(
    above: Sequence[float],
    remainders: dict[float, float],
    shifts: dict[float, float],
    midpoint: bool,
) -> Order:
    """No two neighbouring scales between the floor and the radius."""
    if len(above) > 1 and all(remainders[t] > ASYMPTOTIC * shifts[t] for t in above):
        order = math.log2(remainders[above[1]] / remainders[above[0]])
        where = (
            f"order {order:.2f} with a remainder above {ASYMPTOTIC:.0%} of the shift"
        )
        if order < (MIN_ORDER_MIDPOINT if midpoint else MIN_ORDER):
            reason = f"{where} even at t = {above[0]:.2g}: {_KINK}"
            return Order(Verdict.FAILS, reason, order)
        reason = f"{where} even at t = {above[0]:.2g}: scale the update down"
        return Order(Verdict.INCONCLUSIVE, reason, order)
    return Order(
        Verdict.INCONCLUSIVE,
        "fewer than two scales lie above the rounding floor and below the radius; use "
        "float64",
    )
