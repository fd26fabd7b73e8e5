"""Claim 15: what one steer for many tokens cannot match, and from how many on."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from equiv.report.numbers import figure, percent
from equiv.theory.judging import identity
from equiv.theory.mlps import distinct, evenly
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.shared_maps import (
    VECTOR,
    affine_rank,
    best_map,
    misfit,
    misfit_through,
    with_one,
)
from equiv.theory.toys import Draw, Weights, glu_jvp, glu_slopes
from equiv.theory.values import ClaimResult, Value, Verdict

# What is read and what is written.
PLACES = {
    "mlp_in->mlp_out": ("mlp_in", "mlp_out"),
    "mlp_out": ("mlp_out", "mlp_out"),
    "block_out": ("block_out", "block_out"),
}
RANK = 8
# Toys small enough for one least-squares problem over all entries of the map.
WIDTH, INNER, TOKENS = 8, 20, 32
# Norms of what is left, relative: where a map is exact, inputs with a condition number
# up to 1e7 leave this much of rounding.
EXACT = 1e-8


@claim(
    15,
    title="one steer for many tokens is what cannot match an update",
    formula=(
        "min Σ_i ‖Δ(x_i) − δ_i‖² = 0 for N ≤ 1 (vector), r + 1 (rank r), rank [X 1] "
        "(affine: d + 1, behind a LayerNorm d); > 0 beyond, and never falls with N"
    ),
    assumptions="distinct inputs; an update that is no fold of a steer",
    source="this project",
    falsified_by="nothing left for many more tokens than that",
    derivation="""
        An affine map has d + 1 free vectors: it takes any d + 1 affinely independent
        inputs to any targets, and only structured targets beyond. What LayerNorm puts
        out lies in a hyperplane, which takes one away. Differences of r + 1 targets
        span r dimensions, so rank r is enough for r + 1 tokens. One vector suits one
        token.

        With more tokens there are more squares to be made small by the same numbers:
        the least sum over a larger set is at least that over a subset. As a share of
        the targets it may well fall.

        The same count holds where the map acts through the MLP, from mlp_in: each A is
        invertible (claim 14), so at one token the target is reached exactly.
    """,
)
def shared_parameters(setting: Setting) -> ClaimResult:
    """Maps fitted to nested sets of tokens, on the model and through toy MLPs."""
    toy = of_toys(Draw(setting.seed))
    if toy.verdict is Verdict.FAILS:
        return toy
    found: dict[str, Ladder] = {}
    for layer in evenly(sorted({layer for layer, _ in setting.shifts})):
        for place in PLACES:
            pair = read_and_written(setting, layer, place)
            if pair is not None:
                found |= ladders(f"layer {layer}, {place}", *pair)
    return judge(found, dict(toy.evidence))


@dataclass(frozen=True)
class Ladder:
    """What one form leaves on nested sets of tokens.

    Attributes:
        limit: Most tokens for which nothing has to be left, of those there are.
        share: N → ‖left‖/‖targets‖, the smallest N is the limit.
        total: N → ‖left‖².
    """

    limit: int
    share: Mapping[int, float]
    total: Mapping[int, float]

    @property
    def beyond(self) -> float | None:
        """The share at the most tokens; `None` if these are not beyond the limit."""
        return self.share[max(self.share)] if max(self.share) > self.limit else None

    @property
    def problem(self) -> str:
        """What is not as it has to be."""
        if self.share[self.limit] > EXACT:
            left = figure(self.share[self.limit])
            return f"{left} left at {self.limit} tokens"
        if self.beyond is not None and self.beyond <= EXACT:
            return ""  # nothing but rounding at any number of tokens
        totals = [self.total[n] for n in sorted(self.total)]
        slack = EXACT * max(totals)
        falls = any(b < a - slack for a, b in pairwise(totals))
        return "less is left of more tokens" if falls else ""


def ladders(where: str, x: Tensor, y: Tensor) -> dict[str, Ladder]:
    """The three forms at one place."""
    rank = min(RANK, x.shape[1] // 2)
    limits = {
        "vector": (VECTOR, 1),
        f"rank {rank}": (rank, rank + 1),
        "affine": (None, affine_rank(x)),
    }
    return {
        f"{where}, {form}": ladder(x, y, rank, min(limit, len(x)))
        for form, (rank, limit) in limits.items()
    }


def ladder(x: Tensor, y: Tensor, rank: int | None, limit: int) -> Ladder:
    """One form: at its limit, one token more, and at more and more."""
    sizes = sorted({n for n in (limit, limit + 1, 2 * limit, 4 * limit) if n < len(x)})
    share, total = {}, {}
    for n in (*sizes, len(x)):
        left = misfit(best_map(x[:n], y[:n], rank), x[:n], y[:n])
        share[n], total[n] = left**0.5, left * float(y[:n].square().sum())
    return Ladder(limit, share, total)


def read_and_written(
    setting: Setting, layer: int, place: str
) -> tuple[Tensor, Tensor] | None:
    """(x, y) at distinct tokens; `None` where nothing moves, or there is no such site.

    Of the MLP's output the shift by this block's own update, at the same input.
    """
    reads, writes = PLACES[place]
    read, write = (setting.shifts.get((layer, site)) for site in (reads, writes))
    if read is None or write is None:
        return None
    shift = write.local_exact if writes == "mlp_out" else write.exact
    x, y = read.base[read.mask], shift[write.mask]
    chosen = distinct(x, len(x), setting.seed)
    return (x[chosen], y[chosen]) if bool(y[chosen].any()) else None


def judge(found: Mapping[str, Ladder], toys: dict[str, Value]) -> ClaimResult:
    """The verdict over places and forms."""
    if not found:
        return ClaimResult(
            Verdict.NOT_APPLICABLE, "the update moves nothing at sites of an MLP"
        )
    wrong = {name: own.problem for name, own in found.items() if own.problem}
    short = [name for name, own in found.items() if own.beyond is None]
    shares = {n: x for n, own in found.items() if (x := own.beyond) is not None}
    folds = [name for name, share in shares.items() if share <= EXACT]
    evidence = {
        "tokens": {name: [*own.share] for name, own in found.items()},
        "share left": {name: [*own.share.values()] for name, own in found.items()},
        **toys,
    }
    if wrong:
        name, problem = next(iter(wrong.items()))
        says = f"{name}: {problem} ({len(wrong)} of {len(found)} cases)"
        return ClaimResult(Verdict.FAILS, says, {}, evidence)
    if len(folds) == len(shares):
        verdict = Verdict.NOT_APPLICABLE if folds else Verdict.INCONCLUSIVE
        says = "one map is exact on all tokens: the update is a fold of a steer"
        if not folds:
            says = "no more distinct tokens than a map has free vectors"
        return ClaimResult(verdict, says, {}, evidence)
    conditions: dict[str, Value] = {}
    if folds:
        conditions["exact on all tokens"] = folds
    if short:
        conditions["too few distinct tokens to tell"] = short
    return ClaimResult(
        Verdict.CONDITIONAL if conditions else Verdict.HOLDS,
        said({name: own for name, own in found.items() if name not in folds}),
        conditions,
        evidence,
    )


def said(found: Mapping[str, Ladder]) -> str:
    """Per form, how many tokens it matches and what it leaves of the most."""
    forms: dict[str, list[Ladder]] = {}
    for name, own in found.items():
        forms.setdefault(name.rpartition(", ")[2], []).append(own)
    parts = []
    for form, own in forms.items():
        limits = span([str(n) for n in sorted({ladder.limit for ladder in own})])
        shares = sorted(x for ladder in own if (x := ladder.beyond) is not None)
        left = span([percent(x) for x in shares]) if shares else "–"
        parts.append(f"{form}: {limits} ({left})")
    return f"tokens matched (and what is left of all): {', '.join(parts)}"


def span(sorted_texts: list[str]) -> str:
    """The first and the last."""
    return " to ".join(dict.fromkeys([sorted_texts[0], sorted_texts[-1]]))


def of_toys(draw: Draw) -> ClaimResult:
    """Through the A of a gated MLP: a drawn update, and one that is a steer's fold."""
    w, update = draw.glu(WIDTH, INNER), draw.glu(WIDTH, INNER)
    turn = draw.matrix(WIDTH, WIDTH)
    fold = Weights(w.gate @ turn, w.up @ turn, *list(w.only())[2:])
    u = draw.normal(TOKENS, WIDTH)
    slopes = glu_slopes(w, u)[1]
    y = glu_jvp(w, update, u)

    def left(n: int, reads: Tensor, target: Tensor = y) -> float:
        return misfit_through(slopes[:n], reads[:n], target[:n]) ** 0.5

    affine, vector = with_one(u), torch.ones(TOKENS, 1, dtype=u.dtype)
    normed = torch.nn.functional.layer_norm(u, (WIDTH,))
    return identity(
        {
            "toy, through A: vector, 1 token": left(1, vector),
            "toy, through A: affine, d + 1 tokens": left(WIDTH + 1, affine),
            "toy, through A: affine, all, a fold": left(
                TOKENS, affine, glu_jvp(w, fold, u)
            ),
            "LayerNorm: affinely independent rows less d": float(
                abs(affine_rank(normed) - WIDTH)
            ),
        },
        "toys hold",
        differ={
            "toy, through A: vector, 2 tokens": left(2, vector),
            "toy, through A: affine, d + 2 tokens": left(WIDTH + 2, affine),
            "toy, through A: affine, all tokens": left(TOKENS, affine),
        },
        tolerance=EXACT,
    )
