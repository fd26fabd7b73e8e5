"""Claim 18: a steer at block_out that replaces one at mlp_out."""

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, RANK = 12, 3


@claim(
    18,
    title="with independent skip and MLP parts, A Q h replaces the steer A y",
    formula="A Q h = A y, rank(A Q) ≤ r, ‖Q‖ = 1/sin θ_min",
    assumptions="span{x′} ∩ span{y} = {0}, so dim span{x′} + dim span{y} ≤ d",
    source="blog: post-block steering replicates post-MLP steering",
    falsified_by="a difference beyond 1e-10 with Q",
    kind="exact",
    as_written="P(x′ + y) = x′, and A P h replaces A y",
    derivation="""
        h = x′ + y. If the spans of x′ and y over the data meet only in 0, there is a
        linear Q on their sum with Q x′ = 0 and Q y = y, so A Q h = A y. A product has
        no larger rank than its factors. Q is oblique: with θ the smallest angle between
        the spans, a unit vector of one is sin θ away from the other, so ‖Q‖ = 1/sin θ;
        nearly parallel spans make Q, and with it all noise, large.

        The blog's text takes P onto the other summand, x′, and then A P h = A x′. Its
        figure maps onto the MLP's plane, which is Q.
    """,
)
def block_out_replication(seed: int) -> ClaimResult:
    """Random spans of dimensions 4 and 5 in 12, and 20 tokens in them."""
    draw = Draw(seed)
    skip, mlp = draw.normal(WIDTH, 4), draw.normal(WIDTH, 5)
    x, y = draw.normal(20, 4) @ skip.T, draw.normal(20, 5) @ mlp.T
    steer = draw.matrix(WIDTH, RANK) @ draw.matrix(RANK, WIDTH)
    q = onto_second(skip, mlp)
    rank = int(torch.linalg.matrix_rank(steer @ q, rtol=1e-10))
    size = float(torch.linalg.matrix_norm(q, 2))
    gaps = {
        "A Q h against A y": relative((x + y) @ (steer @ q).T, y @ steer.T),
        "‖Q‖ against 1/sin θ": abs(size * least_sine(skip, mlp) - 1),
        "rank beyond r": float(max(rank - RANK, 0)),
    }
    return identity(
        gaps,
        "A Q h is A y, at the same rank",
        evidence={"norm of Q": size},
        as_written=_as_written(),
    )


def onto_second(first: Tensor, second: Tensor) -> Tensor:
    """Q, [d, d]: keeps the span of the second, removes that of the first."""
    both = torch.cat([first, second], 1)
    keep = torch.cat([torch.zeros_like(first), second], 1)
    return keep @ torch.linalg.pinv(both)


def least_sine(first: Tensor, second: Tensor) -> float:
    """Of the smallest angle between two spans."""
    bases = [torch.linalg.qr(span).Q for span in (first, second)]
    cosine = float(torch.linalg.svdvals(bases[0].T @ bases[1])[0])
    return (1 - cosine**2) ** 0.5


def _as_written() -> AsWritten:
    """Two dimensions are enough: x′ = (1, 0), y = (0, 1), A = I."""
    x, y = torch.eye(2, dtype=torch.float64)
    literal = onto_second(y[:, None], x[:, None]) @ (x + y)
    error = relative(literal, y)
    return AsWritten(
        Verdict.FAILS if error > 1e-8 else Verdict.HOLDS,
        "A P h is A x′, not A y: the projector maps onto the wrong summand",
        {
            "x′": x.tolist(),
            "y": y.tolist(),
            "A": "I",
            "A P h": literal.tolist(),
            "A y": y.tolist(),
            "relative error": error,
        },
    )
