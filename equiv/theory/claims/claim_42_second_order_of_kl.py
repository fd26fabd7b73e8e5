"""Claim 42: KL is a quadratic form of the change of the logits, for small updates."""

from collections.abc import Mapping

from equiv.report.numbers import figure
from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Mean, difference, mean
from equiv.theory.trained.deciding import decided
from equiv.theory.values import ClaimResult, Value, Verdict

# A ratio is 1 + c t + O(t²). From t and 4 t the limit follows up to O(t²), which at the
# smallest t of the study, 2⁻⁸, is far below this unless the second term is above 60.
LIMIT = 1e-3


@claim(
    42,
    title="KL is ½ δzᵀ F δz, and that ranks tokens better than the size of the shift",
    formula=(
        "Σ ½ δzᵀ F δz / Σ KL(tuned ‖ base) → 1 as t → 0, F = diag p − p pᵀ; over "
        "tokens its rank correlation with KL exceeds that of ‖δh‖"
    ),
    assumptions="smooth in t; δz exact, or first order; ‖δh‖ after the last block",
    source="this project",
    falsified_by="a ratio that does not go to 1",
    kind="trained",
    study="fine_tunes",
    derivation="""
        KL(softmax(z + δz) ‖ softmax z) vanishes with its slope at δz = 0 and its second
        derivative there is F. So KL = ½ δzᵀ F δz + O(δz³), and with the update scaled
        by t the ratio of the sums is 1 + c t + O(t²); replacing δz by its derivative
        times t changes c. F knows which directions of the logits matter, ‖δh‖ does not.

        c t is removed by the ratios at two scales. The limit has to be 1 to a
        thousandth for every seed and update, with both changes, or the claim fails. The
        rank correlations at full size are compared seed by seed: the claim holds if
        Student's 95 % interval of every difference lies above 0, and with conditions if
        some do not.

        The same of random updates of equal norm stands in the evidence and judges
        nothing: what it shows too has not been learned.
    """,
)
def second_order_of_kl(results: Mapping[str, Value]) -> ClaimResult:
    """Limits of the ratios, and rank correlations at full size."""
    output = results["output"]
    limits = {
        f"{change}, {name}": [
            limit(ratios, scales)
            for ratios, scales in zip(
                found[f"{change} over KL"], found["scales"], strict=True
            )
        ]
        for name, found in output.items()
        for change in ("exact", "first order")
    }
    better = _better(output)
    control = {name: found["output"] for name, found in results["control"].items()}
    apart = max(abs(value - 1) for values in limits.values() for value in values)
    ranked = decided(better.values())
    conditions = {}
    if not apart < LIMIT:
        verdict = Verdict.FAILS
    elif ranked is Verdict.HOLDS:
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.CONDITIONAL
        conditions = _unsure(better)
    full = [
        ratios[0]
        for found in output.values()
        for change in ("exact", "first order")
        for ratios in found[f"{change} over KL"]
    ]
    return ClaimResult(
        verdict,
        f"the limit is 1 to {figure(apart, 2)}; at full size the ratios lie between "
        f"{figure(min(full), 2)} and {figure(max(full), 2)}",
        conditions=conditions,
        evidence={
            "limit": limits,
            "at full size": {
                f"{change}, {name}": mean(
                    [ratios[0] for ratios in found[f"{change} over KL"]]
                ).to_dict()
                for name, found in output.items()
                for change in ("exact", "first order")
            },
            "rank correlation": {
                f"{figure_of}, {name}": mean(values).mean
                for name, found in output.items()
                for figure_of, values in found["rank correlation"].items()
            },
            "less that of ‖δh‖": {n: m.to_dict() for n, m in better.items()},
            "less that of ‖δh‖, random update of equal norm": {
                name: found.to_dict() for name, found in _better(control).items()
            },
        },
    )


def _better(output: Mapping[str, Value]) -> dict[str, Mean]:
    """Rank correlation with KL, less that of the shift's size."""
    return {
        f"{change}, {name}": difference(
            found["rank correlation"][change], found["rank correlation"]["stream"]
        )
        for name, found in output.items()
        for change in ("exact", "first order")
    }


def limit(ratios: list[float], scales: list[float]) -> float:
    """Where ratios go at t = 0, from the two smallest scales.

    Example:
        >>> limit([2.0, 1.25, 1.0625], [1.0, 0.25, 0.0625])
        1.0
    """
    (_, far), (_, near) = sorted(zip(scales, ratios, strict=True))[1::-1]
    wide, narrow = sorted(scales)[1::-1]
    return near - (far - near) * narrow / (wide - narrow)


def _unsure(better: Mapping[str, Mean]) -> dict[str, str]:
    return {f"less that of ‖δh‖, {n}": str(m) for n, m in better.items() if m.low <= 0}
