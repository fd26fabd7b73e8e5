"""Claim 32: joint training with separate outputs against LoRA and steering alone."""

from collections.abc import Mapping

from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Side
from equiv.theory.trained.comparing import averages, compared, untaught
from equiv.theory.values import ClaimResult, Value, Verdict

JOINT, NAIVE = "joint output", "joint none"
PARTS = ("LoRA", "linear block_out all")
SAME_SIZE = ("LoRA, joint's size", "linear, joint's size")


@claim(
    32,
    title="joint training with separate outputs is no worse than either part alone",
    formula="loss(LoRA + adapter, Bᵀ U = 0) ≤ min(loss(LoRA), loss(adapter))",
    assumptions="the same steps and data; each alone with as many parameters as both",
    source="paper: joint adaptation, second-hand; numbers unknown",
    falsified_by="a mean loss above that of the best single method",
    kind="trained",
    study="adapting",
    derivation="""
        Joint training contains both parts, so it can do what either can; whether it
        finds that in the same number of steps is open, and so is whether the constraint
        helps: it takes r directions of d from the adapter.

        The sources compare with the parts as they are, which have fewer parameters than
        both together. Fair is a single method of the same size: LoRA and an adapter of
        higher rank. Losses are compared seed by seed with the better of the two on
        average. Holds: all of the interval of joint − best lies below 0, against the
        parts and against the methods of the same size. With conditions: only against
        the parts. Fails: above 0 against methods of the same size, and not below the
        parts. Else undecided.

        Naive joint training, said to be often worse than either alone, is judged the
        same way in the evidence, and so is what the constraint does to it.
    """,
)
def joint_training(results: Mapping[str, Value]) -> ClaimResult:
    """Held-out losses of the answers."""
    names = (JOINT, NAIVE, "joint input", *PARTS, *SAME_SIZE)
    if (untold := untaught(results, names)) is not None:
        return untold
    part, single = best(results, PARTS), best(results, SAME_SIZE)
    over_part = compared(results, JOINT, part)
    over_single = compared(results, JOINT, single)
    naive = compared(results, NAIVE, single)
    constraint = compared(results, JOINT, NAIVE)
    evidence = {
        **averages(results, ("base", *names)),
        f"joint output − {part}": over_part.to_dict(),
        f"joint output − {single}": over_single.to_dict(),
        f"joint none − {single}": naive.to_dict(),
        f"joint none − {part}": compared(results, NAIVE, part).to_dict(),
        "joint output − joint none": constraint.to_dict(),
        "joint input − joint none": compared(results, "joint input", NAIVE).to_dict(),
    }
    says = (
        f"Loss with separate outputs − {single}: {over_single}; − {part}: {over_part}; "
        f"naive joint training − {single}: {naive}; what the constraint changes: "
        f"{constraint}"
    )
    above = over_single.side() is Side.ABOVE
    if over_part.side() is Side.BELOW:
        if over_single.side() is Side.BELOW:
            return ClaimResult(Verdict.HOLDS, says, evidence=evidence)
        less = results["parameters"][part] / results["parameters"][JOINT]
        conditions = {"the part alone may be smaller, its share of parameters": less}
        return ClaimResult(Verdict.CONDITIONAL, says, conditions, evidence)
    verdict = Verdict.FAILS if above else Verdict.INCONCLUSIVE
    return ClaimResult(verdict, says, evidence=evidence)


def best(results: Mapping[str, Value], names: tuple[str, ...]) -> str:
    """The method with the least mean loss."""
    return min(names, key=lambda name: sum(results["loss"][name]))
