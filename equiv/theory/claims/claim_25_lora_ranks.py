"""Claim 25: the ranks of the shifts that LoRA causes."""

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
    beyond, short, ranks = {}, {}, {}
    for groups in (1, 2, HEADS):
        for rank in (1, 3):
            draw = Draw(seed)
            heads = draw_heads(draw, WIDTH, HEADS, groups)
            block = Block(heads, draw.glu(WIDTH, 2 * WIDTH))
            h = draw.normal(TOKENS, WIDTH)
            found = {
                name: shift_rank(block, h, lora(draw, block, field, rank), site)
                for name, (field, site) in ADAPTED.items()
            }
            case = f"{groups} value heads, r = {rank}"
            bound = {"o": rank, "down": rank, "v": value_bound(rank)}
            beyond[case] = float(max(0, *(found[k] - bound[k] for k in bound)))
            free = min(found[name] for name in ("q", "k", "gate", "up"))
            short[f"{case}: q, k, gate, up"] = float(WIDTH - free)
            ranks[f"ranks, {case}"] = found
    normed = Block(block.attention, block.mlp, post_norm=True)
    turned = shift_rank(normed, h, lora(draw, normed, "down", 1), "mlp_out")
    return identity(
        {f"beyond the bound, {k}": v for k, v in beyond.items()}
        | {f"short of full, {k}": v for k, v in short.items()}
        | {"short of full, down behind a norm": float(WIDTH - turned)},
        "No rank above its bound, the others full",
        evidence=ranks,
    )


def value_bound(rank: int) -> int:
    """Of the shift of W_v."""
    return min(WIDTH, HEADS * min(rank, HEAD))


def lora(draw: Draw, block: Block, field: str, rank: int) -> Block:
    """The block with B A added to one matrix."""
    part = block.mlp if hasattr(block.mlp, field) else block.attention
    rows, columns = getattr(part, field).shape
    change = draw.matrix(rows, rank) @ draw.matrix(rank, columns)
    moved = type(part)(
        **{**vars(part), field: getattr(part, field) + change}  # pyright: ignore
    )
    if part is block.mlp:
        return Block(block.attention, moved, block.post_norm)  # pyright: ignore
    return Block(moved, block.mlp, block.post_norm)  # pyright: ignore


def shift_rank(base: Block, h: Tensor, tuned: Block, site: str) -> int:
    """Rank over tokens of a block's own shift."""
    before, after = traced([base], h), traced([tuned], h)
    shift = after[0, site] - before[0, site]
    return int(torch.linalg.matrix_rank(shift, rtol=1e-10))
