"""Claim 36: whether an adapter is better linear or with SiLU has no fixed order."""

from collections.abc import Mapping

from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Side
from equiv.theory.trained.comparing import averages, compared, untaught
from equiv.theory.values import ClaimResult, Value, Verdict

PAIRS = {
    "small": ("linear block_out all", "silu block_out all"),
    "large": ("linear, joint's size", "silu, joint's size"),
}


@claim(
    36,
    title="neither the linear nor the SiLU adapter is always the better one",
    formula="the sign of loss(linear) − loss(SiLU) differs between settings",
    assumptions="at block_out of every block, equal numbers of parameters, no biases",
    source="blog: linear ahead at 1B, SiLU ahead at 4B except on one task",
    falsified_by="nothing here: one task cannot show that an order always holds",
    kind="trained",
    study="adapting",
    derivation="""
        A SiLU adapter is no larger class than a linear one of its rank, nor a smaller
        one: near zero it is half a linear map (claim 22), far from it half of its
        directions are shut. Which serves a task better is a matter of the task.

        Two ranks are compared, seed by seed. Holds: the interval lies above 0 at one
        rank and below at the other, so both orders occur. Otherwise undecided: that one
        of them is ahead here, or none, says nothing about other tasks.
    """,
)
def linear_or_silu(results: Mapping[str, Value]) -> ClaimResult:
    """Held-out losses of the answers, at two ranks."""
    names = [name for pair in PAIRS.values() for name in pair]
    if (untold := untaught(results, names)) is not None:
        return untold
    gaps = {rank: compared(results, *pair) for rank, pair in PAIRS.items()}
    sides = {gap.side() for gap in gaps.values()}
    evidence = {
        **averages(results, ("base", *names)),
        **{f"linear − SiLU, {rank} rank": gap.to_dict() for rank, gap in gaps.items()},
    }
    says = "Loss of the linear adapter − loss of the SiLU adapter: " + "; ".join(
        f"{rank} rank {gap}" for rank, gap in gaps.items()
    )
    both = sides == {Side.ABOVE, Side.BELOW}
    verdict = Verdict.HOLDS if both else Verdict.INCONCLUSIVE
    return ClaimResult(verdict, says, evidence=evidence)
