"""The calculus of one update: orders, remainders by scale and predicted radii.

One pass of the engine carries every point that the Taylor test needs (see
`taylor.py`). The next two derivatives come from central differences of JVPs, never
from nested `jvp`, which is silently wrong through `F.layer_norm`:

    f″ ≈ (f′(e) − f′(−e)) / 2e,    f‴ ≈ (f′(e) − 2f′(0) + f′(−e)) / e²

and predict where the relative remainder reaches τ:

    base      t = 2τ ‖f′‖ / ‖f″‖,    midpoint   t = √(24τ ‖f′‖ / ‖f‴‖)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equiv.model.sites import Sites
from equiv.model.stages import Stage, StagedModel
from equiv.shift.derivative import CENTRAL
from equiv.shift.differences import step_of
from equiv.shift.flips import Flips
from equiv.shift.measures import Square, counted, has_tokens
from equiv.shift.propagate import propagate
from equiv.shift.results import Order, Scope, TaylorPoint
from equiv.shift.taylor import ABOVE_NOISE, NOISE_SCALE, SCALES, order_of
from equiv.shift.traces import Point, Trace
from equiv.update.update import Update

# Truncation e²/6 · f⁗/f″ and rounding eps/e² are both far below a radius's 5 %.
DIFFERENCE = 2.0**-6

RowKey = tuple[int, str, Scope]


@dataclass
class Curve:
    """Everything the Taylor test needs at one (layer, site, scope), as sums.

    `unflipped` has the same over the tokens that no scale of the test sends to other
    experts, propagated; `None` where no block up to here chooses experts.
    """

    base: Square = field(default_factory=Square)
    first: Square = field(default_factory=Square)
    second: Square = field(default_factory=Square)
    third: Square = field(default_factory=Square)
    noise: Square = field(default_factory=Square)
    shift: dict[float, Square] = field(default_factory=dict)
    remainder: dict[float, Square] = field(default_factory=dict)
    remainder_midpoint: dict[float, Square] = field(default_factory=dict)
    tokens: int = 0
    step: float | None = None  # of the differences that stand for derivatives, if any
    unflipped: "Curve | None" = None

    def points(self) -> tuple[TaylorPoint, ...]:
        """Remainders, coarsest scale first."""
        return tuple(
            TaylorPoint(
                t,
                self.shift[t].norm,
                self.remainder[t].norm,
                self.remainder_midpoint[t].norm
                if t in self.remainder_midpoint
                else None,
            )
            for t in sorted(self.shift, reverse=True)
        )

    def floor(self, dtype: torch.dtype) -> float:
        """What a remainder cannot be told from: rounding, or a difference's error."""
        noise = self.rounding(dtype)
        if self.step is None:
            return noise
        return noise + noise / (2 * self.step) + self.step**2 / 6 * self.third.norm

    def rounding(self, dtype: torch.dtype) -> float:
        """Rounding noise in a difference of two activations."""
        return max(self.noise.norm, torch.finfo(dtype).eps * self.base.norm)

    def order(self, dtype: torch.dtype, *, midpoint: bool = False) -> Order:
        """Order and verdict of the base or midpoint remainder."""
        return order_of(
            self.points(), self.floor(dtype), self.first.norm, midpoint=midpoint
        )

    def needs_float64(self, tolerance: float) -> bool:
        """Whether float32's rounding would hide what this row's radius is about.

        Rounding noise is proportional to the machine precision, so float32's is 2²⁹
        times the one measured here in float64. At the radius t it has to lie well
        below τ t ‖f′‖, unless there is no shift to be seen even in float64.
        """
        noise = self.rounding(torch.float64)
        if self.first.norm <= ABOVE_NOISE * noise:
            return False
        reach = min(1.0, self.predicted_radius(tolerance) or 1.0)
        ratio = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
        return ABOVE_NOISE * ratio * noise > tolerance * reach * self.first.norm

    def predicted_radius(self, tolerance: float) -> float | None:
        """T = 2τ‖f′‖/‖f″‖; `None` when there is no second-order term."""
        if not self.second.norm or not self.first.norm:
            return None
        return 2 * tolerance * self.first.norm / self.second.norm

    def predicted_radius_midpoint(self, tolerance: float) -> float | None:
        """T = √(24τ‖f′‖/‖f‴‖); `None` when there is no third-order term."""
        if not self.third.norm or not self.first.norm:
            return None
        return math.sqrt(24 * tolerance * self.first.norm / self.third.norm)


@dataclass(frozen=True)
class Selection:
    """Which layers and sites become rows; the model's output always does."""

    layers: frozenset[int]
    sites: tuple[str, ...]

    def takes(self, stage: Stage) -> tuple[str, ...]:
        """The sites of a stage that become rows."""
        if stage.name in ("embed", "bridge"):
            return ()
        if stage.name == "head":
            return (stage.output,)
        if stage.name == "module":
            return (*self.sites, stage.output)
        if stage.layer not in self.layers:
            return ()
        return tuple(site for site in self.sites if site in stage.sites)


def taylor_points(scales: Sequence[float], midpoint: bool) -> tuple[Point, ...]:
    """The points of the engine that the Taylor test needs."""
    tangent_at = {0.0, DIFFERENCE, -DIFFERENCE}
    values_at = {0.0, NOISE_SCALE, *scales}
    if midpoint:
        tangent_at |= {t / 2 for t in scales}
    return tuple(Point(s, s in tangent_at) for s in sorted(values_at | tangent_at))


def curves(
    cut: StagedModel,
    update: Update,
    *,
    low: Sequence[str],
    selection: Selection,
    midpoint: bool = True,
    scales: Sequence[float] = SCALES,
    derivative: str = "forward",
) -> dict[RowKey, Curve]:
    """Taylor curves at every selected layer and site, propagated and local."""
    points = taylor_points(scales, midpoint)
    step = step_of(update, cut.model, cut.dtype) if derivative == CENTRAL else None
    found: dict[RowKey, Curve] = {}
    flips = Flips(cut.gates, scales=None)
    passes = propagate(
        cut, update, points, low=low, local=points, derivative=derivative
    )
    for _, _, traces in passes:
        for trace in traces:
            mask = cut.mask(trace.stage, trace.batch)
            flips.add(trace, mask)
            kept = flips.kept(trace, mask)
            for key, values, tangents in scopes(trace, selection):
                curve = found.setdefault(key, Curve(step=step))
                _add(curve, key[1], values, tangents, mask, scales, midpoint)
                if kept is None or key[2] is not Scope.PROPAGATED:
                    continue
                if has_tokens(values[0.0][key[1]], mask):
                    curve.unflipped = part = curve.unflipped or Curve(step=step)
                    _add(part, key[1], values, tangents, kept, scales, midpoint)
    return found


def scopes(
    trace: Trace, selection: Selection
) -> Iterator[tuple[RowKey, Mapping[float, Sites], Mapping[float, Sites]]]:
    """(key, values, tangents) of each selected site, per scope that applies.

    In a module that is one stage, local and propagated are the same thing.
    """
    stage = trace.stage
    for site in selection.takes(stage):
        yield (stage.layer, site, Scope.PROPAGATED), trace.values, trace.tangents
        if trace.local_values and stage.name != "module":
            key = (stage.layer, site, Scope.LOCAL)
            yield key, trace.local_values, trace.local_tangents


def _add(
    curve: Curve,
    site: str,
    values: Mapping[float, Sites],
    tangents: Mapping[float, Sites],
    mask: Tensor,
    scales: Sequence[float],
    midpoint: bool,
) -> None:
    def at(found: Mapping[float, Sites], scale: float) -> Tensor:
        return counted(found[scale][site], mask)

    base = at(values, 0.0)
    zero = torch.zeros_like(base)

    def slope(scale: float) -> Tensor:
        return at(tangents, scale) if tangents else zero

    first = slope(0.0)
    curve.tokens += len(zero)
    curve.base.add(base)
    curve.first.add(first)
    ahead, behind = slope(DIFFERENCE), slope(-DIFFERENCE)
    curve.second.add((ahead - behind) / (2 * DIFFERENCE))
    curve.third.add((ahead - 2 * first + behind) / DIFFERENCE**2)
    del ahead, behind
    curve.noise.add(at(values, NOISE_SCALE) - base - NOISE_SCALE * first)
    for t in scales:
        shift = at(values, t) - base
        curve.shift.setdefault(t, Square()).add(shift)
        curve.remainder.setdefault(t, Square()).add(shift - t * first)
        if midpoint:
            square = curve.remainder_midpoint.setdefault(t, Square())
            square.add(shift - t * slope(t / 2))
