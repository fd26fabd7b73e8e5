"""Claim 26: the oracle's best linear map against steering trained end to end."""

from collections.abc import Mapping

from equiv.theory.registry import claim
from equiv.theory.trained.certainty import Side, difference
from equiv.theory.values import ClaimResult, Value, Verdict

TRAINED = "loreft block_out all"
ORDERS = ("sequential", "propagated", "local")


@claim(
    26,
    title="the linearised oracle is not nearer to the fine-tune than trained LoReFT",
    formula="KL(FT ‖ best affine map h → Δ) ≥ KL(FT ‖ LoReFT trained on the task)",
    assumptions="at every block_out; fitted on what both were trained on",
    source="blog: FT vs ReFT, FT vs oracle (2.65 against 2.39 nats)",
    falsified_by="the linear oracle nearer on average, at the same rank",
    kind="trained",
    study="adapting",
    derivation="""
        Regression makes each layer's shift as well as a linear map can, in squares that
        count every direction alike. Training spends the same map on what changes the
        answer. On the other hand training on the task knows nothing of the fine-tune,
        and the regression is on its very activations: theory gives no order.

        The source does not say how maps of several layers go together. Sequential: each
        is fitted on the stream steered below it, so errors are made up for. Propagated:
        all on the unsteered stream, which counts lower layers again (claim 40). Local:
        each block's own shift, right to first order (claim 39).

        KL is at the answers of held-out expressions, in nats, compared seed by seed.
        Each order is judged at full rank, where a map has far more numbers than LoReFT,
        and at LoReFT's rank. Holds: all of the interval of oracle − LoReFT lies above 0
        in every case. With conditions: in the cases named. Fails: it lies below 0 for
        the sequential oracle, in which oracles are exact, at LoReFT's own rank. Else
        undecided.
    """,
)
def linear_oracle(results: Mapping[str, Value]) -> ClaimResult:
    """Three orders at two ranks, against one trained LoReFT."""
    kl, rank = results["kl"], f"rank {results['sizes']['rank']}"
    gaps = {
        f"{order}, {size}": difference(kl[f"oracle {order}, {size}"], kl[TRAINED])
        for size in ("full rank", rank)
        for order in ORDERS
    }
    evidence = {
        "KL(FT ‖ ·), nats": {name: sum(own) / len(own) for name, own in kl.items()},
        **{f"{case} − LoReFT": gap.to_dict() for case, gap in gaps.items()},
    }
    gain = difference(kl["base"], kl[TRAINED])
    if gain.side() is not Side.ABOVE:
        says = f"LoReFT did not come nearer to the fine-tune than the base: {gain}"
        return ClaimResult(Verdict.INCONCLUSIVE, says, evidence=evidence)
    found = "; ".join(f"{case}: {gap}" for case, gap in gaps.items())
    says = f"KL of the linear oracle − KL of trained LoReFT, {found}"
    farther = [case for case, gap in gaps.items() if gap.side() is Side.ABOVE]
    if len(farther) == len(gaps):
        return ClaimResult(Verdict.HOLDS, says, evidence=evidence)
    if gaps[f"sequential, {rank}"].side() is Side.BELOW:
        return ClaimResult(Verdict.FAILS, says, evidence=evidence)
    if farther:
        conditions = {"where the oracle is farther": "; ".join(farther)}
        return ClaimResult(Verdict.CONDITIONAL, says, conditions, evidence)
    return ClaimResult(Verdict.INCONCLUSIVE, says, evidence=evidence)
