"""Two claims of one's own: `equiv claims examples/claims/my_claims.py MODEL UPDATE`.

A test gets what its parameters name: see `equiv/theory/setting.py`. The exit status is
1 when one of them fails, so that a statement about a model can stand in CI.
"""

from equiv import Report, Update
from equiv.theory import ClaimResult, Setting, Verdict, claim


@claim(
    "small-update",
    title="the update is at most a fifth as large as the weights",
    formula="‖ΔW‖ ≤ 0.2 ‖W‖",
    source="this project",
)
def small_update(update: Update, report: Report) -> ClaimResult:
    """Where it is larger, first order from the base is rarely usable."""
    size = report.subject.update_relative_norm
    return ClaimResult(
        Verdict.HOLDS if size <= 0.2 else Verdict.FAILS,
        f"‖ΔW‖ is {size:.3f} ‖W‖",
        evidence={"relative norm": size, "parameters": len(update.deltas)},
    )


@claim(
    "midpoint-is-better",
    title="the midpoint derivative misses less than the base's at every layer",
    formula="‖δ − D(W + ΔW/2)[ΔW]‖ < ‖δ − D(W)[ΔW]‖ at block_out",
    source="this project",
)
def midpoint_is_better(setting: Setting) -> ClaimResult:
    """Third order against second; measured in the norm that was asked for."""
    ratios = {}
    for (layer, site), shift in setting.shifts.items():
        if site == "block_out" and shift.exact.any():
            base, middle = shift.first_order, shift.midpoint
            ratios[f"layer {layer}"] = setting.share(
                layer, site, shift.exact - middle, shift.exact - base
            )
    worst = max(ratios.values())
    return ClaimResult(
        Verdict.HOLDS if worst < 1 else Verdict.FAILS,
        f"it misses at most {worst:.2f} times as much",
        evidence=ratios,
    )
