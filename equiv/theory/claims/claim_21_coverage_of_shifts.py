"""Claim 21: how much of the block's shift comes by the skip."""

from collections.abc import Mapping

from equiv.report.numbers import figure, percent
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, Side, mean
from equiv.theory.trained.deciding import (
    at_layer,
    by_layer,
    layers,
    over_layers,
    unlearned,
)
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict

SKIP = "δskip share"
LEAST = 0.1  # below, the source's argument has no object
WRITTEN = (0.3, 0.6)  # what the source says that a steer of the MLP's output leaves


@claim(
    21,
    title="a part of the block's shift comes by the skip, past the MLP",
    formula="‖δskip‖/(‖δMLP‖ + ‖δskip‖) > 0.1 in fine-tuned models",
    assumptions="norms over all held-out tokens; local or propagated, both said",
    source="blog: skip connection and coverage",
    falsified_by="a share below a tenth",
    kind="trained",
    study="fine_tunes",
    as_written="a steer of the MLP's output leaves 30 to 60 % of the block",
    derivation="""
        If a steer makes the MLP's output equal the tuned one, the block's output misses
        exactly the shift of x′. Locally that is the shift of the attention's output,
        propagated also what the blocks below sent; so the share is larger propagated,
        and in the first block both are the same but for updates of the embedding. The
        source infers it from ‖MLP‖/(‖MLP‖ + ‖Attn‖), a ratio of activations, which says
        nothing about what an update changes.

        Per update and scope the share is averaged over layers and seeds. The claim
        holds if Student's 95 % interval lies above a tenth there and at every single
        layer, with conditions where a single layer's does not, fails where an average
        lies below, and is inconclusive otherwise. As written it fails where a layer's
        interval lies outside 30 to 60 %.

        The same of random updates of equal norm stands in the evidence and judges
        nothing: what it shows too has not been learned.
    """,
)
def coverage_of_shifts(results: Mapping[str, Value]) -> ClaimResult:
    """Shares by update, scope and layer."""
    if (undecided := unlearned(results["accuracy"])) is not None:
        return undecided
    tables = _tables(results["coverage"])
    whole = _averages(tables)
    control = _averages(
        _tables({name: found["coverage"] for name, found in results["control"].items()})
    )
    single = {
        f"{name}, layer {layer}": mean(at_layer(ratios[SKIP], layer))
        for name, ratios in tables.items()
        for layer in layers(ratios[SKIP])
    }
    short = {n: m for n, m in single.items() if m.side(LEAST) is not Side.ABOVE}
    sides = {found.side(LEAST) for found in whole.values()}
    if Side.BELOW in sides:
        verdict = Verdict.FAILS
    elif sides != {Side.ABOVE}:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.CONDITIONAL if short else Verdict.HOLDS
    ends = [percent(pick(m.mean for m in whole.values())) for pick in (min, max)]
    return ClaimResult(
        verdict,
        f"the skip has {ends[0]} to {ends[1]} of the shift, averaged over layers",
        conditions={f"not above a tenth: {n}": str(m) for n, m in short.items()},
        evidence={
            "δskip share": {name: found.to_dict() for name, found in whole.items()},
            "δskip share, random update of equal norm": {
                name: found.to_dict() for name, found in control.items()
            },
            "by layer": {
                name: {ratio: by_layer(table) for ratio, table in ratios.items()}
                for name, ratios in tables.items()
            },
        },
        as_written=_as_written(single),
    )


def _tables(coverage: Mapping[str, Value]) -> dict[str, Value]:
    return {
        f"{name}, {scope}": ratios
        for name, by_scope in coverage.items()
        for scope, ratios in by_scope.items()
    }


def _averages(tables: Mapping[str, Value]) -> dict[str, Mean]:
    """The skip's share, averaged over layers."""
    return {name: mean(over_layers(t[SKIP])) for name, t in tables.items()}


def _as_written(single: Mapping[str, Mean]) -> AsWritten:
    low, high = WRITTEN
    outside = {n: m for n, m in single.items() if m.high < low or m.low > high}
    if not outside:
        return AsWritten(Verdict.HOLDS, "every layer's share may lie within")
    name = max(outside, key=lambda n: abs(outside[n].mean - (low + high) / 2))
    return AsWritten(
        Verdict.FAILS,
        f"the share lies outside at {len(outside)} of {len(single)} places; {name} it "
        f"is {figure(outside[name].mean)}",
        {name: outside[name].to_dict()},
    )
