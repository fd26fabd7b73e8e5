"""Claim 39: offsets of each block's own first-order shift, at all blocks at once."""

from equiv.report.numbers import figure, percent
from equiv.theory.approaches import Approach, approaches
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.steered_runs import local_offsets, propagated_offsets, runs
from equiv.theory.values import ClaimResult, Value, Verdict


@claim(
    39,
    title="local first-order offsets at every block_out at once are the update",
    formula="h̃_l ← h̃_l + t δ_l^local for all l: KL(tuned ‖ steered) = Θ(t⁴)",
    assumptions="the update lies in the blocks; smooth activations",
    source="this project",
    falsified_by="an order off by more than 0.2, or a constant off by more than 5 %",
    derivation="""
        To first order the output moves by Σ_l J_(out←l) δ_l, where δ_l is what block
        l's own update does with its input held at the base (claim 11). An offset c_l at
        block_out moves it by J_(out←l) c_l. So offsets c_l = δ_l at all blocks together
        are the first-order equivalence itself, in the form that steering can use: each
        update is counted once, where it is made. What is left of the logits is
        t² d₂ + O(t³), and KL is ½ t⁴ d₂ᵀ F d₂ (1 + O(t)).

        What the update changes before the first or after the last block is in no
        offset, and then the order is 2.
    """,
)
def local_at_once(setting: Setting) -> ClaimResult:
    """Orders of the update in the blocks, and of all of it where there is more."""
    given = _measured(setting)
    inside = setting.in_blocks
    own = given if inside is setting else _measured(inside)
    local = own["local"]
    if own["unsteered"].measured is None:
        return ClaimResult(
            Verdict.INCONCLUSIVE, "the update is too small to be seen in the output"
        )
    conditions: dict[str, Value] = {}
    verdict = Verdict.HOLDS if local.captured and local.agrees else Verdict.FAILS
    if inside is not setting:
        rest = given["local"]
        conditions["the update lies in the blocks"] = (
            f"{percent(rest.missed)} of the first-order change of the output is from "
            f"outside; with it the order is {rest.order}"
        )
        verdict = Verdict.CONDITIONAL if verdict is Verdict.HOLDS else verdict
        verdict = verdict if rest.agrees else Verdict.FAILS
    full = {name: figure(found.full) for name, found in own.items()}
    of_blocks = "" if inside is setting else " of the update in the blocks"
    says = (
        f"order {local.order}; at full size{of_blocks} KL {full['local']}, against "
        f"{full['last block']} with the last block's propagated offset and "
        f"{full['unsteered']} unsteered"
    )
    evidence = {name: found.to_dict() for name, found in own.items()}
    if own is not given:
        evidence |= {f"all, {n}": found.to_dict() for n, found in given.items()}
    found = ClaimResult(verdict, says, conditions, evidence)
    return of_smooth(found, setting.model)


def _measured(setting: Setting) -> dict[str, Approach]:
    propagated = propagated_offsets(setting)
    last = max(propagated)
    with runs(setting) as made:
        steered = {
            "unsteered": made.steered({}),
            "last block": made.steered({last: propagated[last]}),
            "local": made.steered(local_offsets(setting)),
        }
        return approaches(made, made.tuned(setting.update), steered)
