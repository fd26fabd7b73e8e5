"""Claim 13: what a steer at mlp_in writes lies in the columns of W_d."""

import torch
from torch import Tensor

from equiv.report.numbers import percent
from equiv.theory.judging import identity, relative
from equiv.theory.mlps import MLP, NONE_FOUND, column_rank, find_mlps, project
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.toys import Draw, Weights, glu, glu_slopes, hidden
from equiv.theory.values import ClaimResult

TOKENS = 8
WIDTH, INNER, NARROW = 16, 40, 6


@claim(
    13,
    title="a steer at mlp_in moves the MLP's output within the columns of W_d",
    formula="y(u + Δ) − y(u) ∈ col W_d for any Δ; to first order A Δ with A = W_d J",
    assumptions="at the MLP's own output, before any norm; vacuous where rank W_d = d",
    source="blog: GLU, pre-MLP steering; to all orders: this project",
    falsified_by="a component outside col W_d",
    derivation="""
        y(u + Δ) − y(u) = W_d (m(u + Δ) − m(u)): whatever the hidden layer does, W_d has
        the last word, at any size of Δ. Its derivative is A = W_d J with
        J = diag(φ′(a_g) ⊙ a_u) W_g + diag(φ(a_g)) W_u, the Jacobian of the gated MLP.

        An update of W_d writes ΔW_d m, which need not lie there. But a W_d of full row
        rank has all of the space as its columns, and then nothing lies outside. So the
        model's W_d is also cut to half its rank.
    """,
)
def mlp_in_columns(setting: Setting) -> ClaimResult:
    """Drawn steers as large as the inputs: on the model's MLPs, cut and whole."""
    mlps = find_mlps(setting, TOKENS)
    if not mlps:
        return NONE_FOUND
    draw, equal, left = Draw(setting.seed), {}, {}
    for mlp in mlps:
        equal |= of_mlp(mlp, draw)
        narrow = mlp.cut(column_rank(mlp.down) // 2)
        if bool(mlp.down_change.any()):
            written = mlp.run(mlp.u)[0] @ mlp.down_change.T
            left[f"layer {mlp.layer}"] = outside(narrow.down, written)
    ranks = {f"layer {mlp.layer}": column_rank(mlp.down) for mlp in mlps}
    width = len(mlps[0].down)
    full = [layer for layer, rank in ranks.items() if rank == width]
    toy, apart = of_toy(Draw(setting.seed))
    says = "what a steer at mlp_in does lies in col W_d at any size"
    if full:
        says += f", which is everything at full row rank {width}"
    if full and left:
        largest = percent(max(left.values()))
        says += f"; cut to half of it, up to {largest} of ΔW_d m lies outside"
    return identity(
        equal | toy,
        says,
        differ=apart,
        conditions={"vacuous, of full row rank": full} if full else None,
        evidence={"rank W_d": ranks, "ΔW_d m outside half of col W_d": left},
    )


def of_mlp(mlp: MLP, draw: Draw) -> dict[str, float]:
    """What has to be zero of one MLP, with its own W_d and with half of it."""
    name, u = f"layer {mlp.layer}", mlp.u
    steers = draw.normal(*u.shape) * u.square().mean(-1, keepdim=True).sqrt()
    inner, whole = mlp.slopes(u)
    equal = {f"{name}: A less W_d J": relative(whole, mlp.down @ inner)}
    rank = column_rank(mlp.down)
    for part, at in (("", mlp), (" cut to half", mlp.cut(rank // 2))):
        moved = at.run(u + steers)[1] - at.run(u)[1]
        equal[f"{name}, W_d{part}: outside col W_d"] = outside(at.down, moved)
    return equal


def of_toy(draw: Draw) -> tuple[dict[str, float], dict[str, float]]:
    """What has to be zero, and what has not, where W_d has fewer columns than rows."""
    w, u = narrow_glu(draw), draw.normal(4, WIDTH)
    steers = draw.normal(4, WIDTH)
    moved = glu(w, u + steers) - glu(w, u)
    _, whole = glu_slopes(w, u)
    exact = torch.func.jvp(lambda x: glu(w, x), (u,), (steers,))[1]
    written = hidden(w, u) @ draw.matrix(WIDTH, INNER).T
    return (
        {
            "toy: A Δ less the derivative": relative(
                (whole @ steers[..., None])[..., 0], exact
            ),
            "toy: outside col W_d": outside(w.down, moved),
        },
        {"toy: ΔW_d m outside col W_d": outside(w.down, written)},
    )


def narrow_glu(draw: Draw) -> Weights:
    """A gated MLP whose W_d has rank `NARROW`."""
    w = draw.glu(WIDTH, INNER)
    low = draw.matrix(WIDTH, NARROW) @ draw.matrix(NARROW, INNER)
    return w.moved({"down": low - w.down})


def outside(matrix: Tensor, rows: Tensor) -> float:
    """The share of rows that lies outside the columns of a matrix."""
    return relative(project(matrix, rows), rows)
