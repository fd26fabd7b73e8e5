"""Claim 25: the ranks of the shifts that LoRA causes."""

from itertools import product

import torch
from torch import Tensor

from equiv.theory.judging import identity
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import HEAD, Block, draw_heads, traced
from equiv.theory.toys import Draw
from equiv.theory.values import ClaimResult

WIDTH, HEADS, TOKENS = 16, 4, 48
ADAPTED = {
    "o": ("output", "attn_out"),
    "v": ("value", "attn_out"),
    "down": ("down", "mlp_out"),
    "q": ("query", "attn_out"),
    "k": ("key", "attn_out"),
    "gate": ("gate", "mlp_out"),
    "up": ("up", "mlp_out"),
}


@claim(
    25,
    title="LoRA of rank r moves o and down by rank r, v by r per head, others by full",
    formula="rank δ ≤ r for W_o, W_d; ≤ min(d, H · min(r, head width)) for W_v",
    assumptions="local shifts at the module's own output; no norm after it",
    source="this project; rank one in linear attention after OpenReview zFj9T9kZbm",
    falsified_by="a rank above the bound, or q, k, gate, up below full rank",
    kind="exact",
    derivation="""
        δ = B A m for W_o and W_d: at most r directions. B A acts on W_v before the
        heads mix tokens: each query head carries its own share of B A x through its own
        part of W_o, at most min(r, head width) directions each, also where heads share
        values. Rotary positions touch queries and keys only.

        W_q and W_k act through the softmax, W_g and W_u through a product with another
        function of the token: every token gets a direction of its own. A norm after the
        MLP divides by another number per token and turns the shift of W_d to full rank
        too.
    """,
)
def lora_ranks(seed: int) -> ClaimResult:
    """One block of four heads with one, two or four heads of values."""
    equal, evidence = {}, {}
    for groups, rank in product((1, 2, HEADS), (1, 3)):
        found = ranks(Draw(seed), groups, rank, post_norm=False)
        bounds = {"o": rank, "down": rank, "v": value_bound(rank)}
        beyond = max(0, *(found[name] - bound for name, bound in bounds.items()))
        short = WIDTH - min(found[name] for name in ("q", "k", "gate", "up"))
        case = f"{groups} value heads, r = {rank}"
        equal[f"{case}: beyond the bound"] = float(beyond)
        equal[f"{case}: short of full"] = float(short)
        evidence[f"{case}: rank"] = found
    normed = ranks(Draw(seed), 1, 1, post_norm=True)
    equal["down behind a norm: short of full"] = float(WIDTH - normed["down"])
    found = evidence[f"{HEADS} value heads, r = 3: rank"]
    named = ", ".join(f"{name} {n}" for name, n in found.items())
    says = f"No rank above its bound, the others full; LoRA of rank 3 moves {named}"
    return identity(equal, says, evidence=evidence)


def ranks(draw: Draw, groups: int, rank: int, *, post_norm: bool) -> dict[str, int]:
    """Of the shifts by LoRA on each matrix of a block."""
    heads = draw_heads(draw, WIDTH, HEADS, groups)
    block = Block(heads, draw.glu(WIDTH, 2 * WIDTH), post_norm)
    h = draw.normal(TOKENS, WIDTH)
    found = {}
    for name, (field, site) in ADAPTED.items():
        rows, columns = block.matrices[field].shape
        change = draw.matrix(rows, rank) @ draw.matrix(rank, columns)
        found[name] = shift_rank(block, h, block.moved({field: change}), site)
    return found


def value_bound(rank: int) -> int:
    """Of the shift of W_v."""
    return min(WIDTH, HEADS * min(rank, HEAD))


def shift_rank(base: Block, h: Tensor, tuned: Block, site: str) -> int:
    """Rank over tokens of a block's own shift."""
    before, after = traced([base], h), traced([tuned], h)
    shift = after[0, site] - before[0, site]
    return int(torch.linalg.matrix_rank(shift, rtol=1e-10))
