"""Claim 44: what steering leaves is what its local misfits come to at the output."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from equiv.report.numbers import figure
from equiv.steering.fits.fitting import fit
from equiv.steering.forms.form import Steering
from equiv.theory.approaches import CAPTURED
from equiv.theory.orders import SCALES, decay
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.steered_runs import at_block_out, output, runs, size, slope
from equiv.theory.values import ClaimResult, Value, Verdict

RANK = 8


@claim(
    44,
    title="steering error is the sum of the local misfits, carried to the output",
    formula=(
        "z_steered − z_tuned = t Σ_l J_(out←l) m_l + O(t²), m_l = s_l(h_l) − δ_l^local"
    ),
    assumptions="steers at block_out of all blocks, the update in these blocks",
    source="this project",
    falsified_by="error less formula of an order off 2 by more than 0.2",
    derivation="""
        To first order a steer t s_l at block_out moves the output by
        t J_(out←l) s_l(h_l): that it reads the steered stream instead of h_l is of
        second order. The update moves it by t Σ_l J_(out←l) δ_l^local (claim 11). The
        difference is the misfits m_l, each carried to the output by the base.

        So a fit is judged by what its misfit does downstream and not by its size, and
        the error of steering is of first order whenever a misfit is left. The relative
        gap between error and formula is O(t).
    """,
)
def steering_error(setting: Setting) -> ClaimResult:
    """Affine maps of rank 8, fitted to each block's own first-order shift."""
    own = setting.in_blocks
    steers, misfits = fitted(own)
    with runs(own) as made:
        tuned, steered = made.tuned(own.update), made.steered(steers)
        carried = made.steered(misfits)
        expected = [slope(carried, n) for n in made.batches]
        whole = size(made, own.norm, lambda n: expected[n])
        change = size(made, own.norm, lambda n: slope(tuned, n))
        if whole <= CAPTURED * change:
            return ClaimResult(
                Verdict.NOT_APPLICABLE,
                "the steers leave no misfit: there is no first-order error",
            )

        def error(n: int, t: float) -> Tensor:
            return output(steered, n, t) - output(tuned, n, t)

        def rest(n: int, t: float) -> Tensor:
            return error(n, t) - t * expected[n]

        scales = (1.0, *SCALES)
        rests = {t: size(made, own.norm, partial(rest, t=t)) for t in scales}
        gaps = {t: rests[t] / size(made, own.norm, partial(error, t=t)) for t in scales}
        order = decay({t: rests[t] for t in SCALES}, made.rounding(own.norm))
    evidence: dict[str, Value] = {
        "relative gap, by t": {figure(t): gap for t, gap in gaps.items()},
        "order of error less formula": order and order.to_dict(),
        "first-order error over first-order change": whole / change,
    }
    if order is None:
        return ClaimResult(
            Verdict.INCONCLUSIVE, "the update is too small to be seen", {}, evidence
        )
    conditions: dict[str, Value] = {}
    if own is not setting:
        conditions["the update lies in the blocks"] = "the rest of it is left out"
    verdict = Verdict.CONDITIONAL if conditions else Verdict.HOLDS
    if not order.near(2):
        verdict = Verdict.FAILS
    says = (
        f"error and formula differ by {figure(gaps[1.0])} of the error at full size, "
        f"and by order {order.order:.2f} in t; steers of rank {RANK} leave a "
        f"first-order error of {figure(whole / change)} times the first-order change"
    )
    found = ClaimResult(verdict, says, conditions, evidence)
    return of_smooth(found, setting.model)


def fitted(setting: Setting) -> tuple[dict[int, Steering], Mapping[int, Tensor]]:
    """Steers by layer, and what each leaves of its block's own first-order shift."""
    steers, left = {}, {}
    for layer, shift in at_block_out(setting).items():
        rank = min(RANK, shift.base.shape[-1])
        steers[layer] = fit(
            shift.base, shift.local_first_order, rank=rank, mask=shift.mask
        )
        left[layer] = misfit(steers[layer], shift.base, shift.local_first_order)
    return steers, left


def misfit(steer: Steering, h: Tensor, target: Tensor) -> Tensor:
    """S(h) − δ, at every token."""
    return steer(h) - target
