"""Claim 23: what an oracle at one layer does, by depth, site, activation and norms."""

from collections.abc import Mapping

from equiv.report.numbers import figure, percent
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, Side, difference, mean
from equiv.theory.trained.deciding import (
    at_layer,
    by_layer,
    layers,
    over_layers,
    unlearned,
)
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

VARIANTS = ("SiLU", "GELU", "SiLU, post-norms", "GELU, post-norms")
BEFORE_MLP = ("attn_out", "mlp_in")
# The last oracle sets the head's input, up to float32.
EXACT = 1e-3
# What counts as another pattern: a tenth of KL(tuned ‖ base).
MARGIN = 0.1


@claim(
    23,
    title="oracles at block_out get better with depth; the activation governs nothing",
    formula=(
        "ΔKL(block_out, last) = −1, and ΔKL(block_out, l) falls with l; swapping SiLU "
        "for GELU alone moves ΔKL at attn_out and mlp_in by less than 0.1"
    ),
    assumptions=(
        "ΔKL = KL(tuned ‖ steered)/KL(tuned ‖ base) − 1; head, norm before it and "
        "embedding untouched by the update; averages over layers"
    ),
    source="blog: pre-MLP steering",
    falsified_by="the last oracle is not exact, or φ alone changes the pattern",
    kind="trained",
    study="oracles_by_depth",
    as_written="the activation function governs steerability before the MLP",
    derivation="""
        The tuned state after the last block is the head's whole input. Overwriting the
        state after block l takes over all that the updates of blocks 0…l do, and none
        of what the later ones do, so that depth helps as a rule; it is no theorem (a
        block may undo what an earlier one did). Before the MLP the oracle lacks the
        block's own W_g, W_u, W_d, and at mlp_in the skip as well.

        The authors saw Llama and Gemma answer differently before the MLP, blamed φ, and
        withdrew that. The two differ in norms after the sub-layers too, and their
        "pre-MLP" is another place. Here one toy is trained four times per seed, from
        the same weights, with either swapped alone.

        Differences are taken seed by seed. The claim holds if the last oracle's ΔKL is
        −1 to a thousandth everywhere, ΔKL at block_out falls from each layer to the
        next on average over seeds in every variant, and Student's 95 % interval of SiLU
        less GELU lies within a tenth at both sites, with and without norms; with
        conditions where depth once does not help. It fails if the last oracle is not
        exact or a difference lies beyond a tenth, and is inconclusive otherwise. As
        written it fails if that difference is within a tenth, or that of the norms
        surely larger.
    """,
)
def oracles_by_depth(results: Mapping[str, Value]) -> ClaimResult:
    """Last layers, steps between layers, and what each swap does."""
    change = {name: results[name]["change"] for name in VARIANTS}
    for name in change:
        if (undecided := unlearned(results[name]["accuracy"])) is not None:
            return undecided
    apart = max(
        abs(row[-1] + 1) for sites in change.values() for row in sites["block_out"]
    )
    steps = {
        f"{name}, layer {n} less {n - 1}": difference(
            at_layer(sites["block_out"], n), at_layer(sites["block_out"], n - 1)
        )
        for name, sites in change.items()
        for n in layers(sites["block_out"])[1:]
    }
    worse = {name: str(step) for name, step in steps.items() if step.mean >= 0}
    phi = _swapped(change, {"SiLU": "GELU", "SiLU, post-norms": "GELU, post-norms"})
    norms = _swapped(change, {"SiLU": "SiLU, post-norms", "GELU": "GELU, post-norms"})
    if apart > EXACT or any(_beyond(found) for found in phi.values()):
        verdict = Verdict.FAILS
    elif not all(_within(found) for found in phi.values()):
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.CONDITIONAL if worse else Verdict.HOLDS
    largest = max(phi, key=lambda name: abs(phi[name].mean))
    return ClaimResult(
        verdict,
        f"the last oracle is the tuned model to {figure(apart, 2)}; swapping φ moves "
        f"ΔKL by at most {phi[largest]}, {largest}",
        conditions={f"depth does not help: {n}": said for n, said in worse.items()},
        evidence={
            "ΔKL by layer": {
                f"{name}, {site}": by_layer(t)
                for name, sites in change.items()
                for site, t in sites.items()
            },
            "φ swapped": {name: found.to_dict() for name, found in phi.items()},
            "norms swapped": {name: found.to_dict() for name, found in norms.items()},
            "steps at block_out": {n: step.mean for n, step in steps.items()},
            "right on new operators": {
                f"{name}, {model}": percent(mean(shares["new"]).mean)
                for name in change
                for model, shares in results[name]["accuracy"].items()
            },
        },
        as_written=_as_written(phi, norms),
    )


def _swapped(change: Mapping[str, Value], pairs: Mapping[str, str]) -> dict[str, Mean]:
    """First less second of each pair before the MLP, averaged over layers."""
    return {
        f"{first} less {second} at {site}": difference(
            over_layers(change[first][site]), over_layers(change[second][site])
        )
        for first, second in pairs.items()
        for site in BEFORE_MLP
    }


def _within(found: Mean) -> bool:
    return found.side(-MARGIN) is Side.ABOVE and found.side(MARGIN) is Side.BELOW


def _beyond(found: Mean) -> bool:
    return found.side(-MARGIN) is Side.BELOW or found.side(MARGIN) is Side.ABOVE


def _as_written(phi: Mapping[str, Mean], norms: Mapping[str, Mean]) -> AsWritten:
    counter = {name: found.to_dict() for name, found in {**phi, **norms}.items()}
    if any(_beyond(found) for found in phi.values()):
        return AsWritten(Verdict.HOLDS, "swapping φ changes the pattern here", counter)
    if all(_within(found) for found in phi.values()):
        return AsWritten(
            Verdict.FAILS, "swapping φ alone leaves the pattern as it is", counter
        )
    if any(_beyond(found) for found in norms.values()):
        return AsWritten(
            Verdict.FAILS,
            "norms after the sub-layers change the pattern; φ alone does not surely",
            counter,
        )
    return AsWritten(Verdict.INCONCLUSIVE, "the seeds do not tell", counter)
