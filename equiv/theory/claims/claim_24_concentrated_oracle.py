"""Claim 24: whether a fine-tune's shift lies in fewer directions than others."""

from collections.abc import Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import difference, mean
from equiv.theory.trained.deciding import (
    at_layer,
    by_layer,
    decided,
    layers,
    over_layers,
    unlearned,
)
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

MEASURES = ("participation", "k90")
FEW = 0.1  # of the width: what "far fewer" is read as


@claim(
    24,
    title="a fine-tune's shift lies in fewer directions than a random update's",
    formula=(
        "(Σλ)²/Σλ² and k₉₀ of the covariance of δ at block_out are smaller than for a "
        "random ΔW of equal norm, and of equal singular values"
    ),
    assumptions="propagated exact shift; held-out tokens; averaged over layers",
    source="blog: oracle vectors have a concentrated spectrum",
    falsified_by="no gap to the controls",
    kind="trained",
    study="fine_tunes",
    as_written="the covariance of oracle vectors is concentrated: PR ≪ d and k₉₀ ≪ d",
    derivation="""
        Activations of a trained model are concentrated themselves, and so are shifts by
        any update of it: only the gap to a random one is about fine-tuning. One control
        has normal entries of the norm of each entry of ΔW, the other the singular
        values of each matrix between random directions, so that low rank alone explains
        no gap.

        Control less update is taken seed by seed, averaged over layers, for the
        participation ratio (Σλ)²/Σλ² and for k₉₀, the directions that hold nine tenths
        of the variance. The claim holds if Student's 95 % interval of every difference
        lies above 0, with conditions if only those to equal norm do, fails if one of
        those to equal norm lies below, and is inconclusive otherwise. "≪ d" is read as
        a tenth of d, and fails as written where an interval lies above that.
    """,
)
def concentrated_oracle(results: Mapping[str, Value]) -> ClaimResult:
    """Gaps to both controls, by update and measure."""
    if (undecided := unlearned(results["accuracy"])) is not None:
        return undecided
    spread = results["spread"]
    gaps = {
        control: {
            f"{measure}, {name}": difference(
                over_layers(by_kind[control][measure]),
                over_layers(by_kind["update"][measure]),
            )
            for name, by_kind in spread.items()
            for measure in MEASURES
        }
        for control in ("equal norm", "same spectrum")
    }
    verdict = decided(gaps["equal norm"].values())
    conditions = {}
    matched = gaps["same spectrum"]
    if verdict is Verdict.HOLDS and decided(matched.values()) is not verdict:
        verdict = Verdict.CONDITIONAL
        conditions = {f"same spectrum: {n}": str(m) for n, m in matched.items()}
    says = "; ".join(
        f"{name}: {_shown(by_kind['update'])} directions, random of equal norm "
        f"{_shown(by_kind['equal norm'])}, of the same spectrum "
        f"{_shown(by_kind['same spectrum'])}"
        for name, by_kind in spread.items()
    )
    return ClaimResult(
        verdict,
        f"participation ratios: {says}",
        conditions=conditions,
        evidence={
            **{
                f"gap to {control}": {n: m.to_dict() for n, m in found.items()}
                for control, found in gaps.items()
            },
            "by layer": {
                f"{measure}, {name}, {kind}": by_layer(table[measure])
                for name, by_kind in spread.items()
                for kind, table in by_kind.items()
                for measure in MEASURES
            },
        },
        as_written=_as_written(spread, max(results["width"])),
    )


def _shown(measures: Mapping[str, Value]) -> str:
    return figure(mean(over_layers(measures["participation"])).mean, 2)


def _as_written(spread: Mapping[str, Value], width: int) -> AsWritten:
    """The place where the share of the width is largest."""
    places = {
        f"{measure}, {name}, layer {layer}": mean(
            [value / width for value in at_layer(by_kind["update"][measure], layer)]
        )
        for name, by_kind in spread.items()
        for measure in MEASURES
        for layer in layers(by_kind["update"][measure])
    }
    place = max(places, key=lambda name: places[name].low)
    if places[place].low <= FEW:
        return AsWritten(Verdict.HOLDS, "nowhere surely above a tenth of the width")
    return AsWritten(
        Verdict.FAILS,
        f"up to {figure(places[place].mean, 2)} of the width {width} ({place})",
        {place: places[place].to_dict()},
    )
