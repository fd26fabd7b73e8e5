"""Claim 27: what a SiLU adapter gains over a linear one of the same rank."""

from collections.abc import Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, Side, difference, mean
from equiv.theory.trained.deciding import (
    at_layer,
    decided,
    layers,
    over_layers,
    unlearned,
)
from equiv.theory.values import ClaimResult, Value, Verdict

MARGIN = 0.01  # of the squared shift


@claim(
    27,
    title="a low-rank MLP with SiLU fits the block's shift better than an affine map",
    formula=(
        "misfit(affine, r) − misfit(SiLU, r) > 0.01 at block_out, on held-out tokens, "
        "r = 8; and the truncated oracle leaves less than both"
    ),
    assumptions=(
        "both fitted by least squares to the propagated shift of the block; the MLP "
        "has r numbers more, its inner biases; averaged over layers"
    ),
    source="blog: motivation of the nonlinear adapter; defined by this project",
    falsified_by="no layer where it gains more than the margin",
    kind="trained",
    study="fine_tunes",
    derivation="""
        The source leaves open which fit, site and margin are meant. Here: least squares
        at block_out, a margin of one hundredth of the squared shift, sequences that no
        fit has seen. up φ(down h + inner) + bias holds every affine map of its rank
        only as a limit, far from 0, where φ is linear; on the tokens that are fitted
        the descent from the affine fit can but gain, elsewhere it can lose.

        The truncated oracle knows each held-out token's shift along r fixed directions:
        no steer that writes in r directions can be expected below it, and what lies
        between is what reading h does not tell.

        The gain is averaged over layers, seed by seed. The claim holds if Student's 95
        % interval lies above the margin for both updates and the oracle's below both
        fits, with conditions if the gain is surely above 0 for both, but not above the
        margin. It fails if at no layer of any update the interval reaches the margin,
        and is inconclusive otherwise.

        The same of random updates of equal norm stands in the evidence and judges
        nothing: what it shows too has not been learned.
    """,
)
def nonlinear_adapter(results: Mapping[str, Value]) -> ClaimResult:
    """Gains by update, and what the truncated oracle leaves below the better fit."""
    if (undecided := unlearned(results["accuracy"])) is not None:
        return undecided
    forms = results["by form"]
    gains = _gains(forms)
    control = {name: found["by form"] for name, found in results["control"].items()}
    below = {
        name: difference(
            over_layers(table["SiLU"]), over_layers(table["truncated oracle"])
        )
        for name, table in forms.items()
    }
    single = {
        f"{name}, layer {layer}": difference(
            at_layer(table["affine"], layer), at_layer(table["SiLU"], layer)
        )
        for name, table in forms.items()
        for layer in layers(table["affine"])
    }
    bounded = all(found.side() is Side.ABOVE for found in below.values())
    conditions = {}
    if all(found.high < MARGIN for found in single.values()):
        verdict = Verdict.FAILS
    elif bounded and decided(gains.values(), MARGIN) is Verdict.HOLDS:
        verdict = Verdict.HOLDS
    elif bounded and decided(gains.values()) is Verdict.HOLDS:
        verdict = Verdict.CONDITIONAL
        conditions = {f"below the margin, {n}": str(m) for n, m in gains.items()}
    else:
        verdict = Verdict.INCONCLUSIVE
    said = "; ".join(
        f"{name}: {figure(_average(t['affine']), 2)} left by the affine map, "
        f"{figure(_average(t['SiLU']), 2)} by SiLU, "
        f"{figure(_average(t['truncated oracle']), 2)} by the truncated oracle"
        for name, t in forms.items()
    )
    return ClaimResult(
        verdict,
        said,
        conditions=conditions,
        evidence={
            "gain": {name: found.to_dict() for name, found in gains.items()},
            "gain, random update of equal norm": {
                name: found.to_dict() for name, found in _gains(control).items()
            },
            "gain by layer": {name: found.mean for name, found in single.items()},
            "SiLU less truncated oracle": {n: m.to_dict() for n, m in below.items()},
        },
    )


def _gains(forms: Mapping[str, Value]) -> dict[str, Mean]:
    """What the affine map leaves less what SiLU does, averaged over layers."""
    return {
        name: difference(over_layers(table["affine"]), over_layers(table["SiLU"]))
        for name, table in forms.items()
    }


def _average(table: list[list[float]]) -> float:
    return mean(over_layers(table)).mean
