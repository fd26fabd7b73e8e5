"""Claim 29: whether a larger stream damps what a block does to an error."""

from collections.abc import Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Side, difference, mean
from equiv.theory.trained.deciding import at_layer, by_layer, layers
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict


@claim(
    29,
    title="within a layer a block adds less to an error where the stream is larger",
    formula="corr(log ‖(J_l − 1)v‖_t/‖v‖_t, log 1/ρ_t) > 0 over the tokens of a layer",
    assumptions="a block with a norm at its entrance; random v, all tokens together",
    source="blog: layer norms help since their standard deviations are large",
    falsified_by="no correlation with 1/ρ",
    kind="trained",
    study="fine_tunes",
    as_written="the growing norm of the stream damps errors: gain ∝ 1 + O(1/ρ_l)",
    derivation="""
        The block is h + G(N h), and N′ has the factor 1/ρ: with the same G a token of
        twice the size is changed half as much. G′ differs from token to token and far
        more from layer to layer, since a trained block may write as large as the
        stream. So the factor shows within a layer at best.

        J is the Jacobian of a base's block over all tokens together, v normal. Per seed
        and layer the correlation is over tokens. The claim holds if Student's 95 %
        interval lies above 0 at every layer, with conditions if it does at some and not
        at others, fails if it does at none, and is inconclusive if intervals are
        undecided everywhere. As written it fails if between two layers that follow each
        other the stream and the gain grow together, both beyond the spread over seeds.
    """,
)
def gain_and_norm(results: Mapping[str, Value]) -> ClaimResult:
    """Correlations within layers, and gains across them."""
    gain = results["gain"]
    within = {
        f"layer {n}": mean(at_layer(gain["excess with 1/rho"], n))
        for n in layers(gain["rho"])
    }
    total = {
        f"layer {n}": mean(at_layer(gain["gain with 1/rho"], n))
        for n in layers(gain["rho"])
    }
    sides = {name: found.side() for name, found in within.items()}
    above = [name for name, side in sides.items() if side is Side.ABOVE]
    others = {n: str(within[n]) for n in within if n not in above}
    if not others:
        verdict = Verdict.HOLDS
    elif above:
        verdict = Verdict.CONDITIONAL
    elif set(sides.values()) == {Side.UNDECIDED}:
        verdict = Verdict.INCONCLUSIVE
    else:
        verdict = Verdict.FAILS
    ends = [figure(pick(m.mean for m in within.values()), 2) for pick in (min, max)]
    return ClaimResult(
        verdict,
        f"correlations of {ends[0]} to {ends[1]} by layer, above 0 in {len(above)} of "
        f"{len(within)}",
        conditions={f"not above 0: {n}": said for n, said in others.items()},
        evidence={
            "excess with 1/ρ": {n: m.to_dict() for n, m in within.items()},
            "gain with 1/ρ": {n: m.to_dict() for n, m in total.items()},
            **{
                f"{name} by layer": by_layer(gain[name])
                for name in ("rho", "gain", "excess")
            },
        },
        as_written=_as_written(gain),
    )


def _as_written(gain: Mapping[str, Value]) -> AsWritten:
    """Two layers that follow each other, larger in the stream and in the gain."""
    found = {}
    for n in range(1, len(gain["rho"][0])):
        grown = {
            name: difference(at_layer(gain[name], n), at_layer(gain[name], n - 1))
            for name in ("rho", "gain")
        }
        if all(change.side() is Side.ABOVE for change in grown.values()):
            found[n] = grown
    if not found:
        return AsWritten(
            Verdict.HOLDS, "nowhere do the stream and the gain grow together"
        )
    n = max(found, key=lambda n: found[n]["gain"].mean)
    ends = {
        name: [mean(at_layer(gain[name], k)).mean for k in (n - 1, n)]
        for name in ("rho", "gain")
    }
    said = {name: " → ".join(figure(e, 2) for e in pair) for name, pair in ends.items()}
    return AsWritten(
        Verdict.FAILS,
        f"from layer {n - 1} to {n} the stream grows, ρ {said['rho']}, and so does the "
        f"gain, {said['gain']}",
        {**ends, "difference of gains": found[n]["gain"].to_dict()},
    )
