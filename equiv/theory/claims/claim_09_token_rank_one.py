"""Claim 9: at one token a steer is a rank-one update, and context is a steer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Block, adding, draw_block, run, traced
from equiv.theory.toys import Draw, Weights, glu
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, INNER, CONTEXT = 8, 20, 5


@claim(
    9,
    title="at one token a steer is a rank-one update, and context a steer at attn_out",
    formula="W(a + Δ) = (W + W Δ aᵀ/‖a‖²) a; T(C, h) = T(h) with Attn(C, h) − Attn(h)",
    assumptions="one token, a ≠ 0; one block for the part about context",
    source="blog: ICL as steering; the rank-one form after Dherin et al. 2025",
    falsified_by="a mismatch",
    kind="exact",
    as_written="in-context learning is steering attn_out with Δ_A",
    derivation="""
        (W Δ aᵀ) a / ‖a‖² = W Δ, for W_g and W_u alike. The update depends on the token:
        two tokens need two of them. A skip around W is not covered, it needs its own
        correction.

        A block sees its context through attention alone, so adding the difference that
        the context makes to the attention's output gives the block's output in context.
        In the next block the input differs as well: offsets taken from the two runs,
        with and without context, then count what the first block already moved.
    """,
)
def token_rank_one(seed: int) -> ClaimResult:
    """A gated MLP at one token, and blocks with and without five tokens before it."""
    draw = Draw(seed)
    w, a, delta = draw.glu(WIDTH, INNER), draw.normal(WIDTH), draw.normal(WIDTH)
    updated = Weights(
        rank_one(w.gate, a, delta),
        rank_one(w.up, a, delta),
        *list(w)[2:],
    )
    blocks = [draw_block(draw, WIDTH) for _ in range(2)]
    context, h = draw.normal(CONTEXT, WIDTH), draw.normal(1, WIDTH)
    return identity(
        {
            "GLU steered against updated": relative(
                glu(updated, a[None]), glu(w, (a + delta)[None])
            ),
            "one block in context": in_context(blocks[:1], context, h),
        },
        "Both are identities, for one token and one block",
        differ={"two blocks in context": in_context(blocks, context, h)},
        as_written=_as_written(),
    )


def rank_one(matrix: Tensor, a: Tensor, delta: Tensor) -> Tensor:
    """W + W Δ aᵀ/‖a‖²."""
    return matrix + torch.outer(matrix @ delta, a) / (a @ a)


def in_context(blocks: Sequence[Block], context: Tensor, h: Tensor) -> float:
    """How far the run steered by Δ_A in every block is from the run in context."""
    inside, alone = traced(blocks, torch.cat([context, h])), traced(blocks, h)
    offsets = {
        (layer, site): inside[layer, site][-1:] - alone[layer, site]
        for layer, site in alone
        if site == "attn_out"
    }
    wanted = inside[len(blocks) - 1, "block_out"][-1:]
    return relative(run(blocks, h, adding(offsets)), wanted)


def _as_written() -> AsWritten:
    """Numbers: h ← h + the mean over what is seen, no MLP; context 3, token 1."""

    def with_context(c: float, h: float) -> list[tuple[float, float, float]]:
        """(context, token, what attention adds to the token), block by block."""
        steps = []
        for _ in range(2):
            seen = (c + h) / 2
            steps.append((c, h, seen))
            c, h = c + c, h + seen
        return [*steps, (c, h, 0.0)]

    inside = with_context(3.0, 1.0)
    alone, steered, offsets = 1.0, 1.0, []
    for _, _, seen in inside[:2]:
        offsets.append(seen - alone)
        steered = steered + steered + offsets[-1]
        alone = alone + alone
    wanted = inside[-1][1]
    return AsWritten(
        Verdict.FAILS if abs(steered - wanted) > 1e-8 else Verdict.HOLDS,
        "exact in one block; in two, the offsets of the runs with and without context "
        "count the first block's effect again",
        {
            "offsets": offsets,
            "token steered": steered,
            "token in context": wanted,
        },
    )
