"""The shifts that reach a target: a free one per token, a vector, an affine map.

Symbols
    y       the target: the update's shift of the later site, rows [kept, e]
    J, F    the way from the write site to it: Jacobian, and what Δ really does
    h       the activation that Δ is added to

Each Δ is the one of least residual ‖J Δ − y‖. A free Δ per token says what the site can
do at all, a shared one what one vector or map for all tokens can. J may be so
ill-conditioned that Δ is larger than h, where first order means nothing. So every Δ is
applied as well, and for free ones there is the share of tokens that some Δ no larger
than h takes to within a tolerance of t y, by size t: a share from below, since two Δ
are tried, the solver's last and its first within the tolerance, cut to the norm of h.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.steering.jacobian.cgls import Independent, Problems, solve_each
from equiv.steering.jacobian.linearised import effect, fit_passage
from equiv.steering.jacobian.passage import Passage
from equiv.steering.jacobian.shared import TOLERANCE

# What is solved to lie on the edge of a tolerance is outside by rounding half the time.
_WELL_WITHIN = 0.99


@dataclass(frozen=True)
class ReachAt:
    """Shares of tokens that some Δ with ‖Δ‖ ≤ ‖h‖ takes to t times the target.

    Attributes:
        size: t.
        first_order: Share for which J Δ is within the tolerance of t y.
        applied: Share for which applying Δ really gets there.
    """

    size: float
    first_order: float
    applied: float


@dataclass(frozen=True)
class Reach:
    """What one kind of shift at a write site can do for a later site.

    Residuals and errors are relative norms, ‖what is left‖ / ‖target‖; a misfit is
    such a figure squared.

    Attributes:
        layer: Layer of the steer.
        site: Where it reads and writes.
        at: The later site.
        unknown: "token", "vector", "affine r8" (say) or "affine full".
        residual: What is left to first order, at the fitted tokens.
        error: What is left when the shift is applied.
        residual_held_out: As `residual`, at held-out tokens; `None` for "token".
        error_held_out: As `error`, at held-out tokens.
        norm_median: Median of ‖Δ‖ / ‖h‖ over the fitted tokens, h what is written to.
        norm_max: The largest.
        condition: Condition number of the problem: for "token" the median over tokens
            (sequences, where they see each other), estimated from below; for a shared
            shift the order of magnitude that LSMR gives, of features of unit variance.
        iterations: Of the solver.
        converged: Share of the problems that it solved to its tolerance; where it did
            not, the residual is too large and the norm too small.
        tokens: How many tokens were fitted.
        curve: For "token", the shares by size of the target.
    """

    layer: int
    site: str
    at: str
    unknown: str
    residual: float
    error: float
    residual_held_out: float | None
    error_held_out: float | None
    norm_median: float
    norm_max: float
    condition: float
    iterations: int
    converged: float
    tokens: int
    curve: tuple[ReachAt, ...] = ()


class Question:
    """What reaches the target, by the fitted (False) and the held-out (True) part."""

    def __init__(
        self,
        layer: int,
        at: str,
        sides: Mapping[bool, Passage],
        targets: Mapping[bool, Tensor],
    ) -> None:
        self.layer, self.at, self.sides, self.targets = layer, at, sides, targets

    def token(self, iterations: int, tolerance: float, sizes: Sequence[float]) -> Reach:
        """A free shift for every token."""
        passage, target = self.sides[False], self.targets[False]
        own = problems(passage)
        found = solve_each(
            passage.push,
            passage.pull,
            target,
            own,
            iterations=iterations,
            tolerance=TOLERANCE[target.dtype],
            share=_WELL_WITHIN * tolerance,
        )
        return self._reach(
            "token",
            {False: found.x},
            float(found.condition.nanmedian()),
            found.iterations,
            float(found.converged.double().mean()),
            tuple(
                reach_at(passage, own, target, found, size, tolerance) for size in sizes
            ),
        )

    def shared(
        self, form: str, rank: int | None, ridge: float, iterations: int
    ) -> Reach:
        """One shift for all tokens."""
        steering, solved = fit_passage(
            self.sides[False], self.targets[False], form, rank, ridge, iterations
        )
        kind = "full" if rank is None else f"r{rank}"
        return self._reach(
            form if form == "vector" else f"{form} {kind}",
            {out: steering(passage.read) for out, passage in self.sides.items()},
            solved.condition,
            solved.iterations,
            float(solved.converged),
        )

    def _reach(
        self,
        unknown: str,
        deltas: Mapping[bool, Tensor],
        condition: float,
        iterations: int,
        converged: float,
        curve: tuple[ReachAt, ...] = (),
    ) -> Reach:
        effects = {
            out: effect(self.sides[out], delta, self.targets[out])
            for out, delta in deltas.items()
        }
        held, passage = effects.get(True), self.sides[False]
        ratios = relative(deltas[False], passage.height)[passage.kept]
        return Reach(
            layer=self.layer,
            site=passage.road.site,
            at=self.at,
            unknown=unknown,
            residual=effects[False].residual,
            error=effects[False].error,
            residual_held_out=held.residual if held else None,
            error_held_out=held.error if held else None,
            norm_median=float(ratios.median()),
            norm_max=float(ratios.max()),
            condition=condition,
            iterations=iterations,
            converged=converged,
            tokens=len(ratios),
            curve=curve,
        )


def problems(passage: Passage) -> Problems:
    """Which tokens see each other on the way: those of a sequence, or none."""
    stages = passage.road.inside
    if len(stages) == 1 and stages[0][0].name == "block":
        written = torch.arange(len(passage.height), device=passage.height.device)
        return Problems(written, written[passage.kept], len(written))
    unknowns, rows, count = [], [], 0
    for part in passage.parts:
        of_unknowns, of_rows = part.sequences
        unknowns.append(of_unknowns + count)
        rows.append(of_rows + count)
        count += len(part.mask)
    return Problems(torch.cat(unknowns), torch.cat(rows), count)


def relative(delta: Tensor, height: Tensor) -> Tensor:
    """‖Δ‖ / ‖h‖ by row; 0 where nothing is added."""
    size = torch.linalg.vector_norm(delta, dim=-1)
    return torch.where(size > 0, size / height, size)


def reach_at(
    passage: Passage,
    own: Problems,
    target: Tensor,
    found: Independent,
    size: float,
    tolerance: float,
) -> ReachAt:
    """The shares of tokens reached at one size, by the better try of each problem."""
    wanted = size * target
    limit = tolerance * torch.linalg.vector_norm(wanted, dim=-1)
    moving = limit > 0
    counts: list[list[Tensor]] = []
    for delta in (found.within, found.x):
        tried = size * delta
        tried = tried / relative(tried, passage.height).clamp_min(1)[:, None]
        left = [move(tried) - wanted for move in (passage.push, passage.moved)]
        hits = [moving & (torch.linalg.vector_norm(x, dim=-1) <= limit) for x in left]
        counts.append([own.squares(hit[:, None]) for hit in hits])
    best = [torch.maximum(*pair).sum() for pair in zip(*counts, strict=True)]
    return ReachAt(size, *(float(count / moving.sum()) for count in best))
