"""The first-order shift by central differences, where one is asked for.

Symbols
    f(s)        an activation with the update scaled by s; f′, f‴ its derivatives in s
    e           the step, a scale of the update
    ρ           ‖ΔW‖ / ‖W‖ over the matrices that the update touches
    ε           precision of the compute dtype

    f′(s) ≈ (f(s + e) − f(s − e)) / 2e,   error  e²/6 ‖f‴‖  +  about ε ‖f‖ / e

Both model forwards are whole ones: the streams at s ± e pass every stage beside those
that are wanted. Activations move by about ρ of themselves per unit of s, ‖f′‖ ~ ρ ‖f‖
and ‖f‴‖ ~ ρ³ ‖f‖, and then the sum of the two errors is smallest at

    e = (3ε)^⅓ / ρ,   where it is  3^⅔/2 · ε^⅔ ‖f′‖,  about ε^⅔ of the shift:

4e-11 in float64 and 2e-5 in float32, times what rounding and curvature of the model add
to these orders of magnitude. At a kink within the step it is the mean of both slopes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from equiv.model.sites import Sites
from equiv.shift.derivative import CENTRAL
from equiv.shift.traces import OnDemand, Point, Trace
from equiv.update.update import Update


def step_of(update: Update, model: nn.Module, dtype: torch.dtype) -> float:
    """The step e.

    Args:
        update: The update.
        model: The model it fits.
        dtype: Compute dtype.
    """
    size = update.relative_norm(model)
    unit = (3 * torch.finfo(dtype).eps) ** (1 / 3)
    # A touched weight may be zero: then nothing is known of the size.
    return unit / size if 0 < size < math.inf else unit


def with_neighbours(points: Sequence[Point], step: float) -> tuple[Point, ...]:
    """The points, and those beside each derivative that is wanted, all as values."""
    scales = dict.fromkeys(point.scale for point in points)
    for point in points:
        if point.tangent:
            scales |= dict.fromkeys((point.scale + step, point.scale - step))
    return tuple(Point(scale) for scale in scales)


def differenced(
    trace: Trace, points: Sequence[Point], local: Sequence[Point], step: float
) -> Trace:
    """The trace with tangents by differences of its values.

    Args:
        trace: With values at the neighbours of every derivative that is wanted.
        points: The derivatives wanted, propagated.
        local: The same, local.
        step: e.
    """
    if not trace.moved:
        return replace(trace, way=lambda: CENTRAL)
    slopes = _slopes(trace.values, points, step)
    local_slopes = _slopes(trace.local_values, local, step)
    return replace(
        trace, tangents=slopes, local_tangents=local_slopes, way=lambda: CENTRAL
    )


def _slopes(
    values: Mapping[float, Sites], points: Sequence[Point], step: float
) -> Mapping[float, Sites]:
    scales = [point.scale for point in points if point.tangent]
    if not values:
        return {}

    def slope(s: float) -> Sites:
        ahead, behind = s + step, s - step
        low = values[behind]
        return {
            site: (value - low[site]) / (ahead - behind)
            for site, value in values[ahead].items()
        }

    if isinstance(values, OnDemand):  # as wide as the vocabulary
        return OnDemand(scales, slope)
    return {scale: slope(scale) for scale in scales}
