"""Claim 37: one gradient step moves activations along the vector of contrasts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from equiv.report.numbers import figure
from equiv.theory.judging import identity, relative
from equiv.theory.registry import claim
from equiv.theory.toy_blocks import Block, adding, draw_block, run, traced
from equiv.theory.toys import Draw
from equiv.theory.trained.certainty import Mean, Side, difference, mean
from equiv.theory.trained.deciding import by_layer
from equiv.theory.values import ClaimResult, Value, Verdict

WIDTH, TOKENS, LAYERS, LAYER = 8, 5, 3, 1
BY_SKIP = ("attn_out", "mlp_in", "mlp_out")

# One per block: name of a matrix → what is added to it.
Changes = list[dict[str, Tensor]]


@claim(
    37,
    title="a gradient step shifts block_out by −ηJJᵀg, along the vector of contrasts",
    formula="δ = −η J Jᵀ g at block_out; cos(δ, E[h | +] − E[h | −]) > cos by chance",
    assumptions="plain SGD on the weights up to the site; chance: permuted labels",
    source="others: arXiv 2606.10929 (0.58 in one model); this project",
    falsified_by="J Jᵀ g off at block_out, or cosines as with permuted labels",
    kind="trained",
    study="adapting",
    derivation="""
        Let s be a site, g = ∂L/∂s and J = ∂s/∂W. If W reaches the loss through s alone,
        ∂L/∂W = Jᵀ g, and the step −η ∂L/∂W moves s by −η J Jᵀ g to first order. So it
        is for block_out and all weights below. At attn_out, mlp_in and mlp_out the same
        weights reach the loss also through the skip, ∂L/∂W ≠ Jᵀ g, and it is not so.
        That is an identity, checked on three blocks in float64. With momentum or Adam's
        scaling the step is no gradient.

        That the shift resembles a difference of means between labelled examples is
        empirical: J Jᵀ is a metric of its own, and where activations spread into few
        directions any two vectors are alike. So labels are permuted 1000 times; the
        chance level is what 95 % of those vectors stay below.

        Holds: the identity does, and at every layer all of the interval of cosine −
        chance level over seeds lies above 0. With conditions: at the layers named.
        Fails: the identity does not hold, or every layer's interval lies below 0. Else
        undecided.
    """,
)
def gradient_step(results: Mapping[str, Value], seed: int) -> ClaimResult:
    """The identity on a toy, cosines from the study."""
    exact = _identity(seed)
    found = results["gradient step"]
    layers = range(len(found["cosine"][0]))
    cosines = [mean([own[n] for own in found["cosine"]]) for n in layers]
    over = [_over(found, n) for n in layers]
    evidence = {
        **exact.evidence,
        "cosine by layer": [cosine.to_dict() for cosine in cosines],
        "chance level by layer": by_layer(found["by chance"]),
        "share of permutations at or above, by layer": by_layer(found["share"]),
        "1/√d": results["sizes"]["width"] ** -0.5,
    }
    if exact.verdict is Verdict.FAILS:
        return ClaimResult(Verdict.FAILS, exact.says, evidence=evidence)
    says = f"{exact.says}; cosine − chance level by layer: " + "; ".join(
        f"{n}: {own}" for n, own in enumerate(over)
    )
    above = [n for n, own in enumerate(over) if own.side() is Side.ABOVE]
    if len(above) == len(over):
        return ClaimResult(Verdict.HOLDS, says, evidence=evidence)
    if above:
        return ClaimResult(Verdict.CONDITIONAL, says, {"layers": above}, evidence)
    below = all(own.side() is Side.BELOW for own in over)
    verdict = Verdict.FAILS if below else Verdict.INCONCLUSIVE
    return ClaimResult(verdict, says, evidence=evidence)


def _over(found: Mapping[str, Value], layer: int) -> Mean:
    return difference(
        [own[layer] for own in found["cosine"]],
        [own[layer] for own in found["by chance"]],
    )


def _identity(seed: int) -> ClaimResult:
    """Shift of the step against J Jᵀ g at four sites of the second of three blocks."""
    draw = Draw(seed)
    blocks = [draw_block(draw, WIDTH) for _ in range(LAYERS)]
    h, target = draw.normal(TOKENS, WIDTH), draw.normal(TOKENS, WIDTH)
    toy = Toy(blocks, h, target)
    gaps = {
        site: relative(through_site(toy, site), step(toy, site))
        for site in ("block_out", *BY_SKIP)
    }
    return identity(
        {"J Jᵀ g at block_out": gaps["block_out"]},
        "A gradient step moves block_out by −ηJJᵀg and the sites inside the block not",
        differ={f"J Jᵀ g at {site}": gaps[site] for site in BY_SKIP},
        evidence={"largest inside the block": figure(max(gaps.values()))},
    )


@dataclass(frozen=True)
class Toy:
    """Blocks, what they read, and what their output should be."""

    blocks: Sequence[Block]
    h: Tensor
    target: Tensor

    def moved(self, changes: Changes) -> list[Block]:
        """With something added to the matrices of the lower blocks."""
        lower = [b.moved(c) for b, c in zip(self.blocks, changes, strict=False)]
        return [*lower, *self.blocks[len(lower) :]]

    @property
    def unmoved(self) -> Changes:
        """Zeros, for blocks up to `LAYER`."""
        return [
            {name: torch.zeros_like(w) for name, w in block.matrices.items()}
            for block in self.blocks[: LAYER + 1]
        ]

    def loss(self, blocks: Sequence[Block], site: str, added: Tensor) -> Tensor:
        """½‖run − target‖², with something added at the site of block `LAYER`."""
        end = run(blocks, self.h, adding({(LAYER, site): added}))
        return (end - self.target).square().sum() / 2

    def along(self, site: str, changes: Changes) -> Tensor:
        """J · changes."""
        return jvp(self.at(site), (self.unmoved,), (changes,))[1]

    def at(self, site: str) -> Callable[[Changes], Tensor]:
        """The site of block `LAYER` as a function of the changes."""
        return lambda changes: traced(self.moved(changes), self.h)[LAYER, site]


def step(toy: Toy, site: str) -> Tensor:
    """J ∂L/∂W: how the gradient of the whole loss moves the site."""
    nothing = torch.zeros_like(toy.h)
    slope = grad(lambda changes: toy.loss(toy.moved(changes), site, nothing))
    return toy.along(site, slope(toy.unmoved))


def through_site(toy: Toy, site: str) -> Tensor:
    """J Jᵀ g, g the gradient with respect to what is added at the site."""
    slope = grad(lambda added: toy.loss(toy.blocks, site, added))
    g = slope(torch.zeros_like(toy.h))
    back = vjp(toy.at(site), toy.unmoved)[1]
    return toy.along(site, back(g)[0])
