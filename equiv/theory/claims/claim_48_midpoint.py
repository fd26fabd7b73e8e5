"""Claim 48: the derivative at the midpoint of the update, and at more points."""

from equiv.report.numbers import percent
from equiv.theory.orders import OFF
from equiv.theory.registry import claim
from equiv.theory.remainders import left_by_points, orders_of, spoken
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.values import ClaimResult, Value, Verdict

BASE, POINTS = 0, (1, 2, 3, 4)
# Below this share of the shift there is nothing to gain from more points.
ROUNDING = 1e-9


@claim(
    48,
    title="the derivative at the midpoint misses the shift at third order only",
    formula=(
        "‖h(W + tΔW) − h(W) − t Dh(W + tΔW/2)[ΔW]‖ = Θ(t³); "
        "Σ_i w_i Dh(W + s_i ΔW)[ΔW] → h(W + ΔW) − h(W)"
    ),
    assumptions="smooth activations; 0 instead where h is at most quadratic in t",
    source="this project",
    falsified_by="an order off 3 by more than 0.2, or no convergence with more points",
    derivation="""
        The exact shift is the integral of the derivative along the segment from W to
        W + tΔW. The midpoint rule for it costs one derivative, as the base does, and
        is off by t³/24 D³h instead of t²/2 D²h: what bends the curve symmetrically
        about the midpoint cancels.

        Gauss–Legendre with n points integrates polynomials up to degree 2n − 1 without
        error, so what it leaves is of order t^(2n + 1), and more points converge to the
        exact shift at full size.
    """,
)
def midpoint(setting: Setting) -> ClaimResult:
    """Orders at every layer and site; up to four points at full size."""
    orders, exact = orders_of(setting.curves, midpoint=True)
    if not orders and not exact:
        return ClaimResult(
            Verdict.INCONCLUSIVE, "the update is too small to be seen above rounding"
        )
    left = left_by_points(setting, (BASE, *POINTS))
    worst = [max(left[n].values()) for n in (BASE, *POINTS)]
    wrong = [
        f"{name}: order {order:.2f}"
        for name, order in orders.items()
        if abs(order - 3) > OFF
    ]
    if worst[BASE] > ROUNDING and not worst[POINTS[-1]] < worst[1] / 2:
        wrong.append("four points leave more than half of what one does")
    evidence: dict[str, Value] = {
        "orders": orders,
        "no remainder at": exact,
        "left at full size": {
            "by": [*left[BASE]],
            "the base": [*left[BASE].values()],
            **{f"{n} of the segment": [*left[n].values()] for n in POINTS},
        },
    }
    if wrong:
        says = f"{wrong[0]} ({len(wrong)} such)" if len(wrong) > 1 else wrong[0]
        found = ClaimResult(Verdict.FAILS, says, {}, evidence)
        return of_smooth(found, setting.model)
    shares = [percent(left[n]["output"]) for n in (BASE, *POINTS)]
    says = (
        f"{spoken(orders, exact)}; at full size the base misses {shares[0]} of the "
        f"change of the output, the midpoint {shares[1]}, two to four points "
        f"{', '.join(shares[2:])}"
    )
    return ClaimResult(Verdict.HOLDS, says, {}, evidence)
