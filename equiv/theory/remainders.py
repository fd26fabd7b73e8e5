"""Orders of remainders, place by place, and what is left with more points."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from equiv.shift.calculus import Curve, RowKey
from equiv.shift.measures import Comparison, counted
from equiv.shift.propagate import propagate
from equiv.shift.traces import Point
from equiv.theory.orders import ABOVE_FLOOR, decay
from equiv.theory.setting import Setting


def orders_of(
    curves: Mapping[RowKey, Curve], *, midpoint: bool = False
) -> tuple[dict[str, float], list[str]]:
    """Orders by place, and the places where the shift is seen but no remainder.

    Args:
        curves: As `Setting.curves`.
        midpoint: Remainders of the derivative at the midpoint instead of the base.
    """
    orders, exact = {}, []
    for (layer, site, scope), curve in curves.items():
        floor = curve.floor(torch.float64)
        squares = curve.remainder_midpoint if midpoint else curve.remainder
        rests = {t: square.norm for t, square in squares.items()}
        shift = max(square.norm for square in curve.shift.values())
        visible = ABOVE_FLOOR * floor
        if (found := decay(rests, floor)) is not None:
            orders[f"layer {layer}, {site}, {scope.value}"] = found.order
        elif shift > visible >= max(rests.values()):
            exact.append(f"layer {layer}, {site}, {scope.value}")
    return orders, exact


def spoken(orders: Mapping[str, float], exact: Sequence[str]) -> str:
    """Both in words.

    Example:
        >>> spoken({"a": 2.0, "b": 2.0041}, ["c"])
        'order 2.000 to 2.004 at 2 places, no remainder at 1'
        >>> spoken({}, ["c"])
        'no remainder at 1'
    """
    parts = []
    if orders:
        low, high = min(orders.values()), max(orders.values())
        parts.append(f"order {low:.3f} to {high:.3f} at {len(orders)} places")
    if exact:
        parts.append(f"no remainder at {len(exact)}")
    return ", ".join(parts)


def left_by_points(
    setting: Setting, rules: Sequence[int]
) -> dict[int, dict[str, float]]:
    """What Gauss–Legendre rules on the segment leave of the shift, at full size.

    Args:
        setting: Model, update and inputs.
        rules: Numbers of points; 0 stands for the derivative at the base.

    Returns:
        Points → "block 0" … and "output" → relative remainder.
    """
    weights = {n: gauss(n) if n else {0.0: 1.0} for n in rules}
    nodes = sorted({s for rule in weights.values() for s in rule})
    points = [Point(0.0, 0.0 in nodes), Point(1.0)]
    points += [Point(s, True) for s in nodes if s]
    found: dict[int, dict[str, Comparison]] = {n: {} for n in rules}
    with setting.opened() as (cut, low):
        for stage, _, traces in propagate(cut, setting.update, points, low=low):
            between = stage.name in ("embed", "bridge")
            inside = stage.name == "block"
            place = f"block {stage.layer}" if inside else "output"
            site = "block_out" if inside else stage.output
            for trace in traces:
                if between or not trace.tangents:
                    continue
                mask = cut.mask(stage, trace.batch)
                exact = trace.values[1.0][site] - trace.values[0.0][site]
                for n, rule in weights.items():
                    slopes = [w * trace.tangents[s][site] for s, w in rule.items()]
                    claimed = torch.stack(slopes).sum(0)
                    sums = found[n].setdefault(place, Comparison())
                    sums.add(counted(exact, mask), counted(claimed, mask))
    return {
        n: {place: sums.relative_remainder or 0.0 for place, sums in own.items()}
        for n, own in found.items()
    }


def gauss(count: int) -> dict[float, float]:
    """Points of the Gauss–Legendre rule on [0, 1], and their weights.

    Example:
        >>> gauss(1)
        {0.5: 1.0}
    """
    points, weights = np.polynomial.legendre.leggauss(count)
    return {
        float((1 + x) / 2): float(w / 2) for x, w in zip(points, weights, strict=True)
    }
