"""Claim 46: how many tokens' targets mlp_in really reaches, by their size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.report.numbers import percent
from equiv.theory.mlps import MLP, NONE_FOUND, find_mlps
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.values import ClaimResult, Verdict

TOKENS = 12
SIZES = (1e-6, 0.1, 0.3, 1.0)
NEAR = 0.1
ITERATIONS = 20
# Share of tokens that has to be reached where the target is infinitesimal.
ALL = 0.99
# Levenberg–Marquardt's damping, in units of the largest singular value of A, squared:
# where it starts, and by how much a step that was good or bad changes it.
DAMPING, RELAXED, STIFFENED = 1e-6, 0.1, 10.0


@claim(
    46,
    title="a steer at mlp_in reaches every token's target when small, not at full size",
    formula=(
        "share of tokens with some ‖Δ‖ ≤ ‖u‖ and ‖y(u + Δ) − y(u) − t δy‖ ≤ t ‖δy‖/10: "
        "1 as t → 0, less at t = 1"
    ),
    assumptions="W_d of full row rank; smooth activation; shares are lower bounds",
    source="this project",
    falsified_by="tokens not reached as t → 0, or all of them at t = 1",
    derivation="""
        To first order Δ = t A⁻¹ δy reaches any target (claim 14), and as t → 0 it is
        both short and right. At full size it would be many times as long as u, and what
        it does then is something else.

        Whether any other Δ no longer than u gets there is a problem of nonlinear least
        squares, solved for each token by Levenberg–Marquardt inside that ball, from the
        solution for the next smaller target on. It may end in a local minimum: tokens
        that it reaches are reached, of the others nothing is proven.
    """,
)
def finite_reach(setting: Setting) -> ClaimResult:
    """Shares by size of the target, of a few tokens of some layers."""
    mlps = [m for m in find_mlps(setting, TOKENS) if bool(m.changes)]
    if not mlps:
        return NONE_FOUND
    curves = {f"layer {mlp.layer}": curve(mlp) for mlp in mlps}
    whole = {t: sum(c[t] for c in curves.values()) / len(curves) for t in SIZES}
    told = ", ".join(f"{percent(share)} at t = {t:g}" for t, share in whole.items())
    small, full = whole[SIZES[0]], whole[SIZES[-1]]
    conditions = {
        "shares are lower bounds": f"Levenberg–Marquardt, {ITERATIONS} steps",
        "tokens per layer": min(len(mlp.u) for mlp in mlps),
    }
    evidence = {"share reached by t": curves, "mean over layers": whole}
    if small < ALL:
        verdict, says = Verdict.FAILS, "not even small targets are all reached"
    elif full == 1:
        verdict, says = Verdict.FAILS, "every token is reached at full size too"
    else:
        verdict, says = Verdict.CONDITIONAL, "reached of the tokens, at least"
    return ClaimResult(verdict, f"{says}: {told}", conditions, evidence)


def curve(mlp: MLP) -> dict[float, float]:
    """Size t → share of the tokens that are reached."""
    target, delta, found = mlp.target, torch.zeros_like(mlp.u), {}
    moving = target.norm(dim=1) > 0
    last = SIZES[0]
    for t in SIZES:
        search = Search(mlp, t * target, within(delta * (t / last), mlp.u))
        delta, last = search.run(), t
        found[t] = float(search.reached[moving].double().mean())
    return found


def within(delta: Tensor, u: Tensor) -> Tensor:
    """Every Δ cut to the length of its u."""
    ratio = delta.norm(dim=1) / u.norm(dim=1)
    return delta / ratio.clamp(min=1)[:, None]


@dataclass
class Search:
    """Levenberg–Marquardt for many tokens at once, each for itself.

    Attributes:
        mlp: The function.
        target: What it is to be moved by, [tokens, d].
        delta: Where the search is, [tokens, d]; at first, where it starts.
    """

    mlp: MLP
    target: Tensor
    delta: Tensor

    def run(self) -> Tensor:
        """The best Δ found."""
        self.base = self.mlp.run(self.mlp.u)[1]
        left = self.left(self.delta)
        damping = torch.full((len(self.delta),), DAMPING).to(left)
        for _ in range(ITERATIONS):
            if bool(self.reached.all()):
                break
            slopes = self.mlp.slopes(self.mlp.u + self.delta)[1]
            trial = within(self.delta + step(slopes, left, damping), self.mlp.u)
            after = self.left(trial)
            better = after.norm(dim=1) < left.norm(dim=1)
            self.delta = torch.where(better[:, None], trial, self.delta)
            left = torch.where(better[:, None], after, left)
            damping = damping * torch.where(better, RELAXED, STIFFENED)
        return self.delta

    def left(self, delta: Tensor) -> Tensor:
        """What Δ misses, [tokens, d]."""
        moved = self.mlp.run(self.mlp.u + delta)[1] - self.base
        return moved - self.target

    @property
    def reached(self) -> Tensor:
        """Which tokens are within the tolerance."""
        left = self.left(self.delta).norm(dim=1)
        return left <= NEAR * self.target.norm(dim=1)


def step(slopes: Tensor, left: Tensor, damping: Tensor) -> Tensor:
    """−(AᵀA + λ s₁²)⁻¹ Aᵀ r for every token."""
    u, s, v = torch.linalg.svd(slopes, full_matrices=False)
    damped = s / (s.square() + damping[:, None] * s[:, :1].square())
    inside = damped * torch.einsum("nij,ni->nj", u, left)
    return -torch.einsum("nij,ni->nj", v, inside)
