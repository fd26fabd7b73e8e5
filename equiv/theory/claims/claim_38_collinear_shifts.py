"""Claim 38: when a rank-one update moves all tokens along one line."""

import torch
from torch import Tensor

from equiv.theory.judging import identity
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Heads, attention, draw_heads
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, TOKENS, CONTEXTS = 8, 6, 3


@claim(
    38,
    title="rank one on W_o, or W_v with one query head, moves all tokens on one line",
    formula="ΔW_v = b aᵀ: δ_t = W_o b · Σ_s p_ts a·x_s; ΔW_o = b aᵀ: δ_t = b · a·m_t",
    assumptions="local shifts; one query head for W_v",
    source="others: OpenReview zFj9T9kZbm, for linear attention",
    falsified_by="shifts off the line; q or k on a line",
    kind="exact",
    as_written="any rank-one update of W_v moves all tokens along one direction",
    derivation="""
        W_o and the pattern stand to the left and right of b aᵀ, so each token gets a
        multiple of one vector, in any context. With H query heads each has its own
        block of W_o: H vectors, also when all heads share one head of values. W_q and
        W_k act through the softmax: which values come in depends on the context.
    """,
)
def collinear_shifts(seed: int) -> ClaimResult:
    """One head, and two heads that share their values; three contexts."""
    draw = Draw(seed)
    one, two = (draw_heads(draw, WIDTH, heads, 1) for heads in (1, 2))
    contexts = [draw.normal(TOKENS, WIDTH) for _ in range(CONTEXTS)]
    column, row = draw.normal(WIDTH * 2), draw.normal(WIDTH * 2)

    def off(w: Heads, name: str) -> float:
        return off_line(shifts(w, name, contexts, column, row))

    return identity(
        {"W_v": off(one, "value"), "W_o": off(one, "output")},
        "All tokens of all contexts move on one line",
        differ={
            "W_q": off(one, "query"),
            "W_k": off(one, "key"),
            "W_v, two query heads": off(two, "value"),
        },
        as_written=_as_written(off(two, "value")),
    )


def shifts(
    w: Heads, name: str, contexts: list[Tensor], column: Tensor, row: Tensor
) -> Tensor:
    """Of a rank-one update of one matrix, the tokens of all contexts, [tokens, d]."""
    matrix = getattr(w, name)
    change = torch.outer(column[: len(matrix)], row[: matrix.shape[1]])
    moved = w.moved({name: change})
    return torch.cat([attention(moved, x) - attention(w, x) for x in contexts])


def off_line(shifts: Tensor) -> float:
    """Share of the shifts' norm that is not along their main direction."""
    sizes = torch.linalg.svdvals(shifts)
    return float(sizes[1:].norm() / sizes.norm())


def _as_written(off: float) -> AsWritten:
    return AsWritten(
        Verdict.FAILS if off > 1e-8 else Verdict.HOLDS,
        "with two query heads there are two directions, also if they share values",
        {"query heads": 2, "value heads": 1, "share off the main direction": off},
    )
