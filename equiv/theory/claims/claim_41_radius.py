"""Claim 41: up to what size of an update first order holds, from the next term."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from torch.func import jvp
from torch.nn.functional import layer_norm, linear, silu

from equiv.model.batches import at_most
from equiv.report.numbers import figure, percent
from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.scales import Scaled, at_scales
from equiv.theory.setting import Setting
from equiv.theory.toys import Draw, Weights, glu_jvp, slope
from equiv.theory.values import ClaimResult, Value, Verdict

TOKENS = 256
TOLERANCES = (0.1, 0.01)
# Between two scales a remainder is taken as a power of t, which it nearly is: over a
# factor of √2 that is good to a few thousandths.
SCALES = tuple(2.0 ** (k / 2) for k in range(-20, 4))
# Of the differences of derivatives: off by e²/6 times the fourth derivative.
STEP = 2.0**-9
# Largest distance of predicted/measured from 1. It is of first order in τ.
OFF = {0.1: 0.25, 0.01: 0.05}
WIDTH, INNER = 16, 40


@claim(
    41,
    title="the second derivative predicts how far first order reaches",
    formula="‖δ_t − t D¹‖/‖δ_t‖ = τ at t_τ = 2τ ‖D¹‖/‖D²‖ (1 + O(τ))",
    assumptions="smooth in the update; D¹, D² and the remainder over the same tokens",
    source="this project",
    falsified_by="off by more than 25 % at τ = 10 %, or by more than 5 % at τ = 1 %",
    derivation="""
        δ_t = t D¹ + t² D²/2 + O(t³), so the remainder is t² ‖D²‖/2 and its share of
        δ_t is t ‖D²‖/(2 ‖D¹‖), both up to factors 1 + O(t). Set it to τ.

        D² is had by central differences of JVPs, (D¹(e) − D¹(−e))/2e. A `jvp` of a
        `jvp` would be exact where it works; through `F.layer_norm` it gives another
        number and says nothing. What it is off by here is among the figures.
    """,
)
def radius(setting: Setting) -> ClaimResult:
    """Predicted and measured radii of every site, on few tokens."""
    toy = of_toy(Draw(setting.seed))
    if toy.verdict is Verdict.FAILS:
        return toy
    few = at_most(setting.inputs, TOKENS, setting.seed)
    found: list[Radius] = []
    for scaled in at_scales(setting, few, SCALES, (0.0, STEP, -STEP)):
        found += of_layer(scaled)
    return judge(
        [own for own in found if not math.isnan(own.ratio)], dict(toy.evidence)
    )


@dataclass(frozen=True)
class Radius:
    """One site and tolerance.

    Attributes:
        where: Layer and site.
        tolerance: τ.
        predicted: By the second derivative.
        measured: Where the remainder crosses τ; `None` beyond the scales tried.
    """

    where: str
    tolerance: float
    predicted: float
    measured: float | None

    @property
    def ratio(self) -> float:
        """Predicted/measured; `nan` where neither is among the scales tried."""
        if self.measured is not None:
            return self.predicted / self.measured
        low, high = SCALES[0], SCALES[-1] / (1 + OFF[self.tolerance])
        return math.inf if low < self.predicted < high else math.nan


def of_layer(scaled: Scaled) -> Iterator[Radius]:
    """The radii at the sites of one layer."""
    for site in scaled.base:
        first = scaled.slope[0.0][site]
        size, curvature = first.norm(), second(scaled, site).norm()
        if not bool(size) or not bool(curvature):
            continue
        shares = {}
        for t in SCALES:
            shift = scaled.shift[t][site]
            shares[t] = float((shift - t * first).norm() / shift.norm())
        for tolerance in TOLERANCES:
            yield Radius(
                f"layer {scaled.layer}, {site}",
                tolerance,
                predicted(tolerance, float(size), float(curvature)),
                crossing(shares, tolerance),
            )


def second(scaled: Scaled, site: str) -> Tensor:
    """D² by central differences."""
    ahead, behind = (scaled.slope[e][site] for e in (STEP, -STEP))
    return (ahead - behind) / (2 * STEP)


def predicted(tolerance: float, first: float, second: float) -> float:
    """2τ ‖D¹‖/‖D²‖."""
    return 2 * tolerance * first / second


def crossing(shares: Mapping[float, float], tolerance: float) -> float | None:
    """The least t at which the remainder reaches τ, as a power of t in between.

    Example:
        >>> round(crossing({0.25: 0.0625, 0.5: 0.25, 1.0: 1.0}, 0.16), 9)
        0.4
    """
    for low, high in pairwise(sorted(shares)):
        below, above = shares[low], shares[high]
        if 0 < below < tolerance <= above:
            part = math.log(tolerance / below) / math.log(above / below)
            return low * (high / low) ** part
    return None


def judge(found: list[Radius], toys: dict[str, Value]) -> ClaimResult:
    """Whether all are as near as they have to be."""
    if not found:
        return ClaimResult(
            Verdict.NOT_APPLICABLE, "no remainder reaches 1 % at the scales tried"
        )
    ratios = {
        percent(t): {own.where: own.ratio for own in found if own.tolerance == t}
        for t in TOLERANCES
    }
    off = {t: [] for t in TOLERANCES}
    for own in found:
        if not abs(own.ratio - 1) <= OFF[own.tolerance]:
            off[own.tolerance].append(own.where)
    told = [spanned(own, name) for name, own in ratios.items() if own]
    says = f"predicted/measured {', '.join(told)}"
    evidence = {"predicted/measured": ratios, **toys}
    if off[0.01]:
        verdict = Verdict.FAILS
        says += (
            f"; off at {off[0.01][0]} and {len(off[0.01]) - 1} more: not smooth in the "
            "update there, as where a ReLU or a router switches"
        )
    elif off[0.1]:
        verdict = Verdict.CONDITIONAL
    else:
        verdict = Verdict.HOLDS
    conditions = (
        {"small τ: off by more than 25 % at 10 %": off[0.1]} if off[0.1] else {}
    )
    return ClaimResult(verdict, says, conditions, evidence)


def spanned(ratios: Mapping[str, float], tolerance: str) -> str:
    """The least and the largest."""
    low, high = (figure(end(ratios.values()), 3) for end in (min, max))
    return f"{low} to {high} at τ = {tolerance}"


def of_toy(draw: Draw) -> ClaimResult:
    """A gated MLP: D² by differences against its closed form, and by nested `jvp`."""
    w, update = (draw.glu(WIDTH, INNER) for _ in range(2))
    u, x, v = draw.normal(6, WIDTH), draw.normal(WIDTH), draw.normal(WIDTH)
    ahead, behind = (glu_jvp(w.plus(update, e), update, u) for e in (STEP, -STEP))
    by_differences = (ahead - behind) / (2 * STEP)
    closed = second_of_glu(w, update, u)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "F.silu": silu,
        "F.layer_norm": lambda z: layer_norm(z, (WIDTH,)),
    }
    return identity(
        {
            "toy: D² by differences less its closed form": relative(
                by_differences, closed
            )
        },
        "differences are right",
        evidence={
            f"nested jvp through {name}, off by": nested_off(run, x, v)
            for name, run in functions.items()
        },
        tolerance=1e-4,  # e²/6 = 6e-7, times a fourth derivative some times D²
    )


def second_of_glu(w: Weights, update: Weights, u: Tensor) -> Tensor:
    """2 Q2: what an update of all three matrices does to second order, twice."""
    gate, up = linear(u, w.gate), linear(u, w.up)
    d_gate, d_up = linear(u, update.gate), linear(u, update.up)
    first = slope(silu, gate)
    bend = slope(lambda z: slope(silu, z), gate)
    mixed = first * up * d_gate + silu(gate) * d_up
    inner = first * d_gate * d_up + bend * up * d_gate.square() / 2
    return 2 * (linear(mixed, update.down) + linear(inner, w.down))


def nested_off(run: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> float:
    """How far a `jvp` of a `jvp` is from differences of one."""

    def first(z: Tensor) -> Tensor:
        return jvp(run, (z,), (v,))[1]

    differences = (first(x + STEP * v) - first(x - STEP * v)) / (2 * STEP)
    return relative(jvp(first, (x,), (v,))[1], differences)
