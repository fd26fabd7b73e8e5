"""Claim 43: what the best fixed vector leaves, and where it leaves nothing."""

from dataclasses import replace

import torch
from torch import Tensor

from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import HEAD, Block, draw_block, traced
from equiv.theory.toys import Draw
from equiv.theory.values import ClaimResult

WIDTH, TOKENS = 8, 20


@claim(
    43,
    title="the best fixed vector is the mean; it is exact for biases of W_o, W_d, W_v",
    formula="min_v E‖δ − v‖² = E‖δ‖² − ‖E δ‖², at v = E δ",
    assumptions="attention weights sum to 1; at the module's own output",
    source="this project",
    falsified_by="a better vector, or a rest for these biases",
    kind="exact",
    derivation="""
        E‖δ − v‖² = E‖δ‖² − ‖E δ‖² + ‖E δ − v‖². A change of b_o or b_d is the same
        vector for every token. A change of b_v is mixed by weights that sum to 1, so
        every head hands on all of it: a fixed vector W_o Δb_v at attn_out, each query
        head with the part of its head of values. A change of b_g or b_u is seen through
        the token.
    """,
)
def best_fixed_vector(seed: int) -> ClaimResult:
    """A block's shifts by an update of everything, and by updates of one bias."""
    draw = Draw(seed)
    base, change = draw_block(draw, WIDTH), draw_block(draw, WIDTH)
    h = draw.normal(TOKENS, WIDTH)
    delta = shift(base, change, h, "block_out")
    ones = torch.ones(TOKENS, 1, dtype=h.dtype)
    brute = delta - ones @ torch.linalg.lstsq(ones, delta).solution
    value = change.attention.value_bias.unflatten(0, (-1, HEAD))
    passed = base.attention.output @ value.repeat_interleave(2, 0).flatten()
    of_value = shift(base, only(change, "value_bias"), h, "attn_out")
    of_output = shift(base, only(change, "output_bias"), h, "attn_out")
    of_down = shift(base, only(change, "down_bias"), h, "mlp_out")
    of_up = shift(base, only(change, "up_bias"), h, "mlp_out")
    return identity(
        {
            "left by least squares against the formula": abs(
                share(brute, delta) - left(delta)
            ),
            "left of b_o": left(of_output),
            "left of b_d": left(of_down),
            "left of b_v": left(of_value),
            "b_v against W_o Δb_v": relative(of_value, passed.expand_as(of_value)),
        },
        "Least squares does what the formula says, and biases are vectors",
        differ={"left of b_u": left(of_up)},
        evidence={"left of an update of everything": left(delta)},
    )


def left(delta: Tensor) -> float:
    """1 − ‖E δ‖²/E‖δ‖²."""
    return float(1 - delta.mean(0).square().sum() / delta.square().sum(1).mean())


def share(rest: Tensor, delta: Tensor) -> float:
    """What a fit leaves, as a share of the squared shift."""
    return float(rest.square().sum() / delta.square().sum())


def only(change: Block, name: str) -> Block:
    """The part of an update that one tensor is."""
    return replace(
        change, attention=change.attention.only(name), mlp=change.mlp.only(name)
    )


def shift(base: Block, change: Block, h: Tensor, site: str) -> Tensor:
    """What an update does to a site of one block."""
    before, after = traced([base], h), traced([base.plus(change)], h)
    return after[0, site] - before[0, site]
