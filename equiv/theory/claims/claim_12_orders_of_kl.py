"""Claim 12: how fast KL goes to zero with the update, unsteered and steered."""

from collections.abc import Mapping

from torch import Tensor

from equiv.report.numbers import percent
from equiv.theory.approaches import Approach, approaches
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.steered_runs import local_offsets, propagated_offsets, runs
from equiv.theory.values import ClaimResult, Value, Verdict

LAST, LOCAL = "last block, propagated", "all blocks, local"
TWICE, MEAN = "all blocks, propagated", "last block, fixed vector"


@claim(
    12,
    title="KL is of order 2 in the update, and of order 4 after first-order steering",
    formula=(
        "KL(tuned ‖ base) = ½ t² δzᵀ F δz + O(t³); KL(tuned ‖ steered) = "
        "½ t⁴ d₂ᵀ F d₂ + O(t⁵), F = diag p − p pᵀ"
    ),
    assumptions=(
        "the steer captures every update exactly once: the last block's propagated "
        "offset, or local offsets at all blocks; nothing is updated behind them"
    ),
    source="this project",
    falsified_by="an order off by more than 0.2, or a constant off by more than 5 %",
    derivation="""
        KL(p ‖ q) has its minimum 0 at p = q, with second derivative F in the logits. If
        tuned and steered logits differ by t d₁ + t² d₂ + O(t³), then KL is
        ½ ‖t d₁ + t² d₂‖²_F (1 + O(t)): of order 2 with the constant ½ d₁ᵀ F d₁, unless
        the steer gives all of the first-order change, d₁ = 0; then of order 4 with
        ½ d₂ᵀ F d₂, where d₂ is half of the difference of the second derivatives.

        d₁ is not 0 where an update lies behind the steered site (final norm, head),
        where propagated offsets at all blocks count earlier updates again (claim 40),
        and where a fitted steer leaves a misfit, however small the update is (claim
        16).
    """,
)
def orders_of_kl(setting: Setting) -> ClaimResult:
    """Five steers for the update as it is, two for its part in the blocks."""
    found = _measured(setting, (LAST, LOCAL, TWICE, MEAN))
    if found["unsteered"].measured is None:
        return ClaimResult(
            Verdict.INCONCLUSIVE, "the update is too small to be seen in the output"
        )
    conditions: dict[str, Value] = {}
    complete = found
    if not (found[LAST].captured and found[LOCAL].captured):
        for name in (LAST, LOCAL):
            if not found[name].captured:
                conditions[f"{name}: first-order change that it misses"] = (
                    f"{percent(found[name].missed)}, so the order is "
                    f"{found[name].order}"
                )
        own = _measured(setting.in_blocks, (LAST, LOCAL))
        complete = {f"update in the blocks; {n}": own[n] for n in (LAST, LOCAL)}
        found |= complete
        steered = [*complete.values()]
    else:
        steered = [found[LAST], found[LOCAL]]
    wrong = {name: one for name, one in found.items() if not one.agrees}
    uncaptured = [name for name, one in complete.items() if _fails(name, one)]
    evidence = {name: one.to_dict() for name, one in found.items()}
    if wrong or uncaptured:
        names = "; ".join([*wrong, *uncaptured])
        says = f"not as predicted: {names}"
        broken = ClaimResult(Verdict.FAILS, says, conditions, evidence)
        return of_smooth(broken, setting.model)
    orders = " and ".join(one.order for one in steered)
    says = (
        f"order {found['unsteered'].order} unsteered, {orders} with the last block's "
        f"propagated and with all local offsets"
    )
    if conditions:
        says += " where the update lies in the blocks"
    verdict = Verdict.CONDITIONAL if conditions else Verdict.HOLDS
    return ClaimResult(verdict, says, conditions, evidence)


def steers(setting: Setting) -> dict[str, Mapping[int, Tensor]]:
    """First-order offsets, by name: layer → offset."""
    local, propagated = local_offsets(setting), propagated_offsets(setting)
    last = max(propagated)
    counts = setting.shifts[last, "block_out"].mask
    mean = propagated[last][counts].mean(0).expand_as(propagated[last])
    return {
        LAST: {last: propagated[last]},
        LOCAL: local,
        TWICE: propagated,
        MEAN: {last: mean},
    }


def _measured(setting: Setting, names: tuple[str, ...]) -> dict[str, Approach]:
    chosen = steers(setting)
    with runs(setting) as made:
        paths = {"unsteered": made.steered({})}
        paths |= {name: made.steered(chosen[name]) for name in names}
        return approaches(made, made.tuned(setting.update), paths)


def _fails(name: str, found: Approach) -> bool:
    """Whether a steer that should capture everything does not."""
    return (LAST in name or LOCAL in name) and not found.captured
