"""Claim 19: the least error of replacing a steer at mlp_out by one at block_out."""

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw
from equiv.theory.values import ClaimResult

WIDTH, RANK, TOKENS = 8, 2, 200


@claim(
    19,
    title="in general the least linear replication error is tr(A Σ Aᵀ)",
    formula="min_B E‖A y − B h‖² = tr(A Σ_(y|h) Aᵀ), at rank ≤ r; Σ_(x′|h) = Σ_(y|h)",
    assumptions="moments of the fitted tokens; uncentred: linear, centred: affine",
    source="this project",
    falsified_by="a fit below the formula, or far above it",
    kind="exact",
    derivation="""
        The best linear guess of y from h is Σ_yh Σ_hh⁺ h, and Σ_(y|h) = Σ_yy −
        Σ_yh Σ_hh⁺ Σ_hy is the covariance of what it misses. A guess of A y is A times
        it, of rank at most r, and misses tr(A Σ_(y|h) Aᵀ).

        h = x′ + y, so what is missed of x′ is minus what is missed of y: the same
        covariance limits both parts. The error on unseen tokens is larger, by a factor
        that goes to 1 with the number of tokens.
    """,
)
def least_replication_error(seed: int) -> ClaimResult:
    """Correlated skip and MLP parts of full rank; fits by least squares."""
    draw = Draw(seed)
    both = draw.normal(2 * TOKENS, 2 * WIDTH) @ draw.matrix(2 * WIDTH, 2 * WIDTH)
    both = both + draw.normal(2 * WIDTH)  # means, which an affine fit may use
    x, y = both[:TOKENS, :WIDTH], both[:TOKENS, WIDTH:]
    steer = draw.matrix(WIDTH, RANK) @ draw.matrix(RANK, WIDTH)
    equal = {}
    for name, centre in (("linear", False), ("affine", True)):
        skip, mlp = (part - centre * part.mean(0) for part in (x, y))
        h, target = skip + mlp, mlp @ steer.T
        fit = torch.linalg.lstsq(h, target).solution
        error = (target - h @ fit).square().sum(1).mean()
        missed = conditional(mlp, h)
        expected = torch.trace(steer @ missed @ steer.T)
        equal[f"{name}: fit against formula"] = relative(error, expected)
        equal[f"{name}: Σ of x′ against Σ of y"] = relative(
            conditional(skip, h), missed
        )
        rank = int(torch.linalg.matrix_rank(fit, rtol=1e-9))
        equal[f"{name}: rank beyond r"] = float(max(0, rank - RANK))
    return identity(
        equal,
        "Least squares reaches the formula and goes no lower",
        evidence=_held_out(both, steer),
    )


def conditional(y: Tensor, h: Tensor) -> Tensor:
    """Σ_(y|h) from second moments, [d, d]."""
    n = len(y)
    yh, hh = y.T @ h / n, h.T @ h / n
    return y.T @ y / n - yh @ torch.linalg.pinv(hh) @ yh.T


def _held_out(both: Tensor, steer: Tensor) -> dict[str, float]:
    """The fit's error on as many unseen tokens, over the formula."""
    x, y = both[:, :WIDTH], both[:, WIDTH:]
    h, target = x + y, y @ steer.T
    fit = torch.linalg.lstsq(h[:TOKENS], target[:TOKENS]).solution
    unseen = (target - h @ fit)[TOKENS:].square().sum(1).mean()
    formula = torch.trace(steer @ conditional(y[:TOKENS], h[:TOKENS]) @ steer.T)
    share = formula / target[:TOKENS].square().sum(1).mean()
    return {
        "share of the steer that is out of reach": float(share),
        f"held-out error over formula, {TOKENS} tokens": float(unseen / formula),
    }
