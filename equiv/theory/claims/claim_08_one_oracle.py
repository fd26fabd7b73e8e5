"""Claim 8: one oracle at one block."""

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Block, Steer, draw_block, run, traced
from equiv.theory.toys import Draw
from equiv.theory.values import ClaimResult

WIDTH, TOKENS, LAYERS = 8, 6, 3


@claim(
    8,
    title="an oracle at block l is the tuned model up to l, and the base after it",
    formula="run = base_(l+1…L) ∘ tuned_(0…l), so = tuned if no later block is updated",
    assumptions="all positions; final norm and head, also tied ones, as in the base",
    source="this project",
    falsified_by="any residual",
    kind="exact",
    derivation="""
        The stream after block l is all that later blocks see. Set to the tuned one, it
        makes the run the hybrid of tuned blocks up to l and base blocks after it, at
        any size of the update. So the oracle is complete when no later block is
        updated, and the last block's is complete for every update but those of the
        final norm and the head, tied embeddings included.

        Later blocks read all positions by attention. An oracle at the last position
        alone suffices there only at the last block, after which nothing mixes
        positions.
    """,
)
def one_oracle(seed: int) -> ClaimResult:
    """Three blocks; an oracle at each, at all positions and at the last one."""
    draw = Draw(seed)
    base = [draw_block(draw, WIDTH) for _ in range(LAYERS)]
    tuned = [block.plus(draw_block(draw, WIDTH), 0.3) for block in base]
    h = draw.normal(TOKENS, WIDTH)
    everywhere, last = torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1)
    last[-1] = 1

    def with_oracle(layer: int, mask: Tensor, of: list[Block] = tuned) -> Tensor:
        return run(base, h, oracle(traced(of, h), layer, mask.double()))

    equal, differ = {}, {}
    for layer in range(LAYERS):
        hybrid = [*tuned[: layer + 1], *base[layer + 1 :]]
        target = run(hybrid, h)
        found = with_oracle(layer, everywhere)
        equal[f"layer {layer}, against the hybrid"] = relative(found, target)
        few = relative(with_oracle(layer, last)[-1], target[-1])
        where = equal if layer == LAYERS - 1 else differ
        where[f"layer {layer}, at the last position alone"] = few
    end = run(tuned, h)
    equal["last layer, against the tuned model"] = relative(
        with_oracle(LAYERS - 1, everywhere), end
    )
    differ["layer 0, against the tuned model"] = relative(
        with_oracle(0, everywhere), end
    )
    head, change = draw.normal(WIDTH, WIDTH), draw.normal(WIDTH, WIDTH)
    differ["last layer, the head updated too"] = relative(
        with_oracle(LAYERS - 1, everywhere) @ head, end @ (head + 0.3 * change)
    )
    return identity(
        equal, "The oracle is the hybrid, with no difference", differ=differ
    )


def oracle(target: dict[tuple[int, str], Tensor], layer: int, mask: Tensor) -> Steer:
    """Overwrite one block's output at some positions, mask [tokens, 1]."""

    def steer(at: int, site: str, activation: Tensor) -> Tensor:
        if (at, site) != (layer, "block_out"):
            return activation
        return mask * target[at, site] + (1 - mask) * activation

    return steer
