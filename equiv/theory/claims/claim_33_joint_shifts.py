"""Claim 33: which shifts of a joint adaptation are orthogonal."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.functional import silu

from equiv.theory.judging import VISIBLE, identity
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Block, draw_block, traced
from equiv.theory.toys import Draw
from equiv.theory.values import AsWritten, ClaimResult, Verdict

WIDTH, RANK, TOKENS = 8, 2, 10


@claim(
    33,
    title="with Bᵀ U = 0 the adapter's shift is orthogonal to that of LoRA on W_d",
    formula="Bᵀ U = 0: ‖δ_LoRA + δ_adapter‖² = ‖δ_LoRA‖² + ‖δ_adapter‖² per token",
    assumptions="LoRA on W_d only, at that layer's block_out, no norm after the MLP",
    source="this project",
    falsified_by="a cross term; none for LoRA elsewhere",
    kind="exact",
    as_written="with Bᵀ U = 0 the shifts are orthogonal for LoRA on all linear layers",
    derivation="""
        The first-order shifts are B A m and U φ(D h): one in col B, one in col U, which
        are orthogonal. Nothing of the kind holds for LoRA on W_o, whose B is another;
        for W_g and W_u, whose shift goes through W_d; behind a norm; or downstream,
        where the next block mixes both.
    """,
)
def joint_shifts(seed: int) -> ClaimResult:
    """First-order shifts of two blocks, LoRA and adapter in the first."""
    draw = Draw(seed)
    blocks = [draw_block(draw, WIDTH) for _ in range(2)]
    normed = [replace(block, post_norm=True) for block in blocks]
    h = draw.normal(TOKENS, WIDTH)
    update = {
        name: draw.matrix(len(w), RANK) @ draw.matrix(RANK, w.shape[1])
        for name, w in blocks[0].matrices.items()
    }
    up, down = draw.matrix(WIDTH, RANK), draw.matrix(RANK, WIDTH)
    kept = constrained(up, update["down"])

    def cross(
        *names: str, up: Tensor = kept, layer: int = 0, norm: bool = False
    ) -> float:
        of = normed if norm else blocks
        moved = {name: update[name] for name in names}
        return cross_term(
            shift(of, h, layer, moved, None), shift(of, h, layer, {}, (up, down))
        )

    return identity(
        {"W_d": cross("down")},
        "Orthogonal at every token",
        differ={
            "W_d, without the constraint": cross("down", up=up),
            "W_o": cross("output"),
            "W_g and W_u": cross("gate", "up"),
            "W_d, behind a norm": cross("down", norm=True),
            "W_d, one block later": cross("down", layer=1),
        },
        as_written=_as_written(cross(*update)),
    )


def constrained(up: Tensor, update: Tensor) -> Tensor:
    """U without its part in the columns of LoRA's update."""
    written = torch.linalg.svd(update).U[:, :RANK]
    return up - written @ (written.T @ up)


def cross_term(first: Tensor, second: Tensor) -> float:
    """Root mean square over tokens of the cosine between two shifts."""
    cosine = torch.cosine_similarity(first, second, dim=-1)
    return float(cosine.square().mean().sqrt())


def shift(
    blocks: Sequence[Block],
    h: Tensor,
    layer: int,
    update: Mapping[str, Tensor],
    adapter: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """First-order shift of a block's output by what happens in the first block."""

    def end(scale: Tensor) -> Tensor:
        def steer(at: int, site: str, activation: Tensor) -> Tensor:
            if adapter is None or (at, site) != (0, "block_out"):
                return activation
            up, down = adapter
            return activation + scale * silu(activation @ down.T) @ up.T

        changes = {name: scale * change for name, change in update.items()}
        return traced([blocks[0].moved(changes), *blocks[1:]], h, steer)[
            layer, "block_out"
        ]

    zero = torch.zeros((), dtype=h.dtype)
    return jvp(end, (zero,), (torch.ones_like(zero),))[1]


def _as_written(cosine: float) -> AsWritten:
    return AsWritten(
        Verdict.FAILS if cosine > VISIBLE else Verdict.HOLDS,
        "only the part of W_d is; the others write in other columns",
        {"cosine of both shifts, LoRA on all seven matrices": cosine},
    )
