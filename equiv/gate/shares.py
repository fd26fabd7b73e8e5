"""How much of each part of an update was really applied, from outputs alone.

Symbols
    g           a part of the update: a layer, or a kind of weight over all layers
    c_g         how much of it was applied: 1 all, 0 none, −1 with its sign flipped
    z(c)        outputs of the base with W + Σ_g c_g ΔW_g, less their mean per token
    y           the observed outputs
    J_g         derivative of z in c_g, by `jvp` through all later stages

Nonlinear least squares, min_c ‖y − z(c)‖², by Gauss–Newton from c = ½, the midpoint,
where the first step is already right to third order:

    c ← c + (JᵀJ)⁻¹ Jᵀ (y − z(c))

A step that makes things worse is halved. Where y really comes from some c, this ends at
that c to rounding, also for an update applied twice, at which one linearisation blurs
2 to 1.5. What is left of y − z(c) tells whether scaling parts of the update explains
the outputs at all.

The standard errors are robust to whatever else is in the outputs, sequence by sequence:
cov = (JᵀJ)⁻¹ (Σ_s J_sᵀ r_s r_sᵀ J_s) (JᵀJ)⁻¹. Rounding of stored weights is the same in
every sequence, though, and does not show in them: b = (JᵀJ)⁻¹ Jᵀ n, with n what storing
in bfloat16 does to the outputs, is added in proportion to how much of n is left in r. A
part is not identifiable when it moves no output, or only as other parts do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import jvp

from equiv.gate.outputs import centred, pair
from equiv.gate.sides import TopK
from equiv.model.stages import Stage, StagedModel
from equiv.update.low_rank import Delta, LowRank

ITERATIONS = 12
# With fewer sequences than this each is divided: from one alone Jᵀr is zero at the end.
CLUSTERS = 8
SETTLED = 1e-4  # largest change of a coefficient that ends the iteration
HALVINGS = 6
START = 0.5
# Directions of c that move the outputs less than this share of the best one, squared,
# are below what float64 can tell.
SINGULAR = 1e-10


@dataclass
class Solution:
    """What the least squares found.

    Attributes:
        shares: c per part.
        errors: Standard error per part; infinite where it is not identifiable.
        explained: 1 − ‖y − z(c)‖² / (‖y − z(0)‖ + ‖y − z(1)‖)².
        left: ‖y − z(c)‖ / ‖n‖: what is left, in units of storing in bfloat16.
        iterations: Linearisations made.
        forwards: Cost, in forwards of the model: each part's `jvp` costs three from the
            first stage that it touches on.
    """

    shares: dict[str, float]
    errors: dict[str, float]
    explained: float
    left: float
    iterations: int
    forwards: float


def solve(
    cut: StagedModel,
    observed: Sequence[Tensor | TopK],
    deltas: Mapping[str, Delta],
    parts: Mapping[str, Sequence[str]],
    rounding: Sequence[Tensor],
    start: float = START,
) -> Solution:
    """Find c from observed outputs.

    Args:
        cut: The base cut into stages, one batch per group of rows.
        observed: The outputs of each group.
        deltas: ΔW by parameter name.
        parts: Names of the parameters of each part.
        rounding: n of each group, logits.
        start: Where c starts, for all parts.
    """
    names = list(parts)
    part_of = {name: i for i, part in enumerate(names) for name in parts[part]}
    run = _Linearised(cut, deltas, part_of, len(names), observed, rounding)
    c = torch.full((len(names),), start, dtype=torch.float64)
    none = run.at(torch.zeros_like(c), slopes=False)
    whole = run.at(torch.ones_like(c), slopes=False)
    here = run.at(c)
    left, iterations = here.square, 1
    for _ in range(ITERATIONS):
        step = _solved(here.normal, here.slope)
        found = run.descent(c, step, left)
        if found is None:
            break
        moved = float((found[0] - c).abs().max())
        c, left = found
        if moved < SETTLED:  # the derivatives are those of `here`, to as many digits
            break
        here = run.at(c)
        iterations += 1
    errors = _errors(here)
    # ‖z(1) − z(0)‖ <= ‖y − z(1)‖ + ‖y − z(0)‖: what the update does, at most.
    effect = (none.square**0.5 + whole.square**0.5) ** 2
    explained = 1 - left / effect if effect else 1.0
    return Solution(
        dict(zip(names, c.tolist(), strict=True)),
        dict(zip(names, errors, strict=True)),
        explained,
        (left / here.noise) ** 0.5 if here.noise else math.inf,
        iterations,
        run.forwards,
    )


@dataclass
class _Point:
    """Sums at one c: JᵀJ, Jᵀr, Jᵀn, ‖r‖², ‖y‖², ‖n‖², and Jᵀr of each sequence."""

    normal: Tensor
    slope: Tensor
    leaning: Tensor
    square: float = 0.0
    size: float = 0.0
    noise: float = 0.0
    clusters: list[Tensor] = field(default_factory=list)


class _Linearised:
    """z(c) and its derivatives, stage by stage."""

    def __init__(
        self,
        cut: StagedModel,
        deltas: Mapping[str, Delta],
        part_of: Mapping[str, int],
        count: int,
        observed: Sequence[Tensor | TopK],
        rounding: Sequence[Tensor],
    ) -> None:
        self.cut, self.deltas, self.part_of = cut, deltas, part_of
        self.count, self.observed, self.rounding = count, observed, rounding
        self.forwards = 0.0

    def at(self, c: Tensor, *, slopes: bool = True) -> _Point:
        point = _Point(
            torch.zeros(self.count, self.count, dtype=torch.float64),
            torch.zeros(self.count, dtype=torch.float64),
            torch.zeros(self.count, dtype=torch.float64),
        )
        streams: list[tuple[Tensor | None, dict[int, Tensor]]]
        streams = [(None, {}) for _ in self.cut.batches]
        for stage in self.cut.stages:
            tensors = self.cut.tensors(stage)
            own = {n: _dense(self.deltas[n]) for n in stage.names if n in self.deltas}
            tensors |= {n: tensors[n] + c[self.part_of[n]] * d for n, d in own.items()}
            for i, (h, dh) in enumerate(streams):
                reached = self._through(stage, tensors, own, h, dh, i, slopes)
                if stage.name == "head":  # logits of all rows would not fit together
                    self._add(point, i, *reached)
                else:
                    streams[i] = reached
        return point

    def descent(
        self, c: Tensor, step: Tensor, square: float
    ) -> tuple[Tensor, float] | None:
        """The first of the step and its halves that makes ‖r‖² smaller."""
        for halving in range(HALVINGS):
            trial = c + step * 0.5**halving
            found = self.at(trial, slopes=False).square
            if found < square:
                return trial, found
        return None

    def _through(
        self,
        stage: Stage,
        tensors: dict[str, Tensor],
        own: Mapping[str, Tensor],
        hidden: Tensor | None,
        tangents: Mapping[int, Tensor],
        batch: int,
        slopes: bool,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        out, _ = self.cut.run(stage, tensors, hidden, batch)
        share = 1 / len(self.cut.stages) / len(self.cut.batches)
        self.forwards += share
        moved: dict[int, Tensor] = {}
        noted = self.cut.notebooks(stage, tensors)
        still = {name: torch.zeros_like(value) for name, value in noted.items()}
        for part in range(self.count) if slopes else ():
            mine = {n: d for n, d in own.items() if self.part_of[n] == part}
            if not mine and part not in tangents:
                continue
            stream = {"h": hidden} if part in tangents else {}

            def run(
                weights: dict[str, Tensor],
                x: dict[str, Tensor],
                stage: Stage = stage,
            ) -> Tensor:
                h = x.get("h", hidden)
                return self.cut.run(stage, {**tensors, **weights}, h, batch)[0]

            direction = {"h": tangents[part]} if part in tangents else {}
            at = {name: tensors[name] for name in mine}
            self.forwards += 3 * share
            moved[part] = jvp(
                run, ({**at, **noted}, stream), ({**mine, **still}, direction)
            )[1]
        return out, moved

    def _add(
        self, point: _Point, batch: int, logits: Tensor, tangents: dict[int, Tensor]
    ) -> None:
        seen = self.observed[batch]
        target, model = pair(seen, logits)
        rest = target - model
        point.square += float(rest.square().sum())
        point.size += float(target.square().sum())
        if not tangents:
            return
        columns = torch.zeros(self.count, *rest.shape, dtype=torch.float64)
        for part, tangent in tangents.items():
            columns[part] = _observed_slope(seen, logits, tangent)
        flat = columns.flatten(2)  # [parts, batch, seq · features]
        point.normal += torch.einsum("pbf,qbf->pq", flat, flat)
        each = torch.einsum("pbf,bf->bp", flat, rest.flatten(1))
        point.slope += each.sum(0)
        point.clusters += _clusters(columns, rest)
        noise = _observed_slope(seen, logits, self.rounding[batch])
        point.noise += float(noise.square().sum())
        point.leaning += torch.einsum("pbf,bf->p", flat, noise.flatten(1))


def _dense(delta: Delta) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta.double()


def _clusters(columns: Tensor, rest: Tensor) -> list[Tensor]:
    """Jᵀr of each sequence, or of parts of it where there are few sequences."""
    batch, seq = rest.shape[:2]
    pieces = min(seq, -(-CLUSTERS // batch))
    return [
        torch.einsum("psf,sf->p", columns[:, row, part], rest[row, part])
        for row in range(batch)
        for part in torch.arange(seq).tensor_split(pieces)
    ]


def _observed_slope(seen: Tensor | TopK, logits: Tensor, tangent: Tensor) -> Tensor:
    """Derivative of what is observed of the logits."""
    if not isinstance(seen, TopK):
        return centred(tangent)
    # d log softmax(z) = dz − Σ p dz
    mean = (torch.softmax(logits, -1) * tangent).sum(-1, keepdim=True)
    return (tangent - mean).gather(-1, seen.ids.to(tangent.device))


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    """(JᵀJ)⁻¹ Jᵀr; directions that move no output get no step."""
    values, vectors = torch.linalg.eigh(normal)
    kept = values > SINGULAR * values.clamp_min(0).max()
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse * (vectors.T @ right))


def _errors(point: _Point) -> list[float]:
    """Standard error of each c; infinite for parts that the outputs do not show."""
    values, vectors = torch.linalg.eigh(point.normal)
    kept = values > SINGULAR * values.clamp_min(0).max()
    inverse = torch.where(kept, 1 / values, torch.zeros_like(values))
    bread = vectors @ torch.diag(inverse) @ vectors.T
    meat = torch.zeros_like(point.normal)
    for each in point.clusters:
        meat += torch.outer(each, each)
    count = len(point.clusters)
    meat *= count / max(1, count - len(values))  # parameters use up clusters
    spread = (bread @ meat @ bread).diagonal().clamp_min(0)
    bias = bread @ point.leaning
    # One draw of the rounding: where a part's happens to be small, take the usual size.
    bias = bias.square().clamp_min(float(bias.square().mean()))
    left = min(1.0, point.square / point.noise) if point.noise else 0.0
    spread = (spread + left * bias).sqrt()
    # The share of each part that lies in directions which move nothing.
    hidden = vectors[:, ~kept].square().sum(1)
    return [
        float("inf") if float(lost) > 1e-3 else float(error)
        for error, lost in zip(spread, hidden, strict=True)
    ]
