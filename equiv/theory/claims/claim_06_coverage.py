"""Claim 6: what steering the MLP's output leaves of a tuned block."""

from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import adding, draw_block, traced
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, TOKENS = 8, 6


@claim(
    6,
    title="matching the tuned MLP output leaves exactly the shift of the skip part",
    formula="Δ = y_FT − y leaves h_FT − h̃ = x′_FT − x′; Δ = h_FT − h leaves 0",
    assumptions="no norm after the MLP; one free vector per token",
    source="blog: post-MLP steering changes only the MLP term",
    falsified_by="another gap, or a gap with the free Δ",
    kind="exact",
    as_written="steering before the skip is added cannot replicate a fine-tuned block",
    derivation="""
        h = x′ + y. With Δ = y_FT − y at mlp_out the block gives x′ + y_FT, and the
        tuned one x′_FT + y_FT: the difference is the skip part's own shift.

        That is a statement about the target. The site writes to the same place as
        block_out, so with one free vector per token Δ = h_FT − h reaches h_FT from
        mlp_out. What sets the two sites apart is what a steer can read there, y or
        x′ + y.
    """,
)
def coverage(seed: int) -> ClaimResult:
    """One block whose attention and MLP are both updated."""
    draw = Draw(seed)
    base, change = draw_block(draw, WIDTH), draw_block(draw, WIDTH)
    h = draw.normal(TOKENS, WIDTH)
    before, after = traced([base], h), traced([base.plus(change, 0.3)], h)

    def gap(delta: Tensor) -> Tensor:
        steered = traced([base], h, adding({(0, "mlp_out"): delta}))
        return after[0, "block_out"] - steered[0, "block_out"]

    free = gap(own_shift(before, after, "block_out"))
    skip = own_shift(before, after, "resid_mid")
    block = own_shift(before, after, "block_out")
    return identity(
        {
            "gap against x′_FT − x′": relative(
                gap(own_shift(before, after, "mlp_out")), skip
            ),
            "gap of the free steer": float(free.norm() / block.norm()),
        },
        "The gap is the skip part's shift, and a free steer closes it",
        evidence={"skip part's share of the shift": float(skip.norm() / block.norm())},
        as_written=_as_written(),
    )


def own_shift(
    before: dict[tuple[int, str], Tensor],
    after: dict[tuple[int, str], Tensor],
    site: str,
) -> Tensor:
    """What the update does to a site."""
    return after[0, site] - before[0, site]


def _as_written() -> AsWritten:
    """One dimension: the update takes x′ from 1 to 2 and leaves y = 3."""
    skip, tuned_skip, mlp = 1.0, 2.0, 3.0
    tuned = tuned_skip + mlp
    steered = skip + (mlp + (tuned - (skip + mlp)))
    return AsWritten(
        Verdict.FAILS if steered == tuned else Verdict.HOLDS,
        "with a free vector per token it does: both sites write to the same stream",
        {
            "x′": skip,
            "x′ tuned": tuned_skip,
            "y": mlp,
            "Δ at mlp_out": tuned - (skip + mlp),
            "block steered": steered,
            "block tuned": tuned,
        },
    )
