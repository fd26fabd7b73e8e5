"""Claim 40: propagated offsets at all blocks at once count earlier layers again."""

from functools import partial

from torch import Tensor

from equiv.report.numbers import figure
from equiv.theory.approaches import CAPTURED
from equiv.theory.orders import SCALES, decay
from equiv.theory.parts import blocks_of
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.steered_runs import (
    Path,
    Runs,
    apart,
    at_block_out,
    local_offsets,
    output,
    propagated_offsets,
    runs,
    size,
    slope,
)
from equiv.theory.values import AsWritten, ClaimResult, Value, Verdict


@claim(
    40,
    title="propagated offsets at all blocks over-count by (L − l) times each layer's",
    formula=(
        "h̃_l ← h̃_l + t δ_l for all l: z_steered − z_tuned = "
        "t Σ_l (L − l) J_(out←l) δ_l^local + O(t²), l = 0…L"
    ),
    assumptions="the update lies in the blocks; two or more of these, on one stream",
    source="this project; as written, the blog: the oracle overwrites the stream",
    falsified_by="another first-order term",
    as_written=(
        "adding h_FT − h_base at every layer gives h_FT: h_base + (h_FT − h_base) = "
        "h_FT"
    ),
    derivation="""
        The propagated shift δ_l holds what every block up to l does: δ_l is the sum
        of J_(l←k) δ_k^local over k ≤ l. An offset δ_l at block l moves the output by
        J_(out←l) δ_l. Summed over l, block k's own shift arrives once for each block
        from k to L, so L − k + 1 times instead of once.

        The excess is of first order, of the size of the shift itself, so it does not
        get better with a smaller update; unsteered may be nearer.
    """,
)
def over_count(setting: Setting) -> ClaimResult:
    """The first-order excess exactly, and what is left of it at finite scales."""
    if blocks_of(setting.model).encoder is not None:
        return ClaimResult(
            Verdict.NOT_APPLICABLE,
            "an encoder's last block reaches every block of the decoder, so shifts are "
            "counted by more ways than one stream has",
        )
    own = setting.in_blocks
    local, propagated = local_offsets(own), propagated_offsets(own)
    last = max(local)
    if last == 0:
        return ClaimResult(
            Verdict.NOT_APPLICABLE, "one block: there is nothing to count twice"
        )
    with runs(own) as made:
        tuned, steered = made.tuned(own.update), made.steered(propagated)
        excess = made.steered(weighted(local))
        first = size(made, own.norm, lambda n: slope(tuned, n))
        if not first:
            return ClaimResult(
                Verdict.INCONCLUSIVE, "the first-order change of the output is zero"
            )
        parts = [
            (slope(steered, n) - slope(tuned, n), slope(excess, n))
            for n in made.batches
        ]
        gap = size(made, own.norm, lambda n: parts[n][0] - parts[n][1])
        whole = size(made, own.norm, lambda n: parts[n][1])

        def left(n: int, t: float) -> Tensor:
            return output(steered, n, t) - output(tuned, n, t) - t * parts[n][1]

        rests = {t: size(made, own.norm, partial(left, t=t)) for t in SCALES}
        order = decay(rests, made.rounding(own.norm))
        written = _as_written(made, own, tuned)
    exact = gap / first <= CAPTURED
    conditions: dict[str, Value] = {}
    if own is not setting:
        conditions["the update lies in the blocks"] = "the rest of it is left out"
    if not exact or (order and not order.near(2)):
        verdict = Verdict.FAILS
    else:
        verdict = Verdict.CONDITIONAL if conditions else Verdict.HOLDS
    says = (
        f"the excess is {figure(whole / first)} times the first-order change itself, "
        f"and the formula is off by {figure(gap / first, 2)} of it"
    )
    evidence = {
        "excess over first-order change": whole / first,
        "formula off by": gap / first,
        "order of what is left at finite t": order and order.to_dict(),
        "left over the excess, by t": {
            figure(t): rest / (t * whole) for t, rest in rests.items()
        },
    }
    found = ClaimResult(verdict, says, conditions, evidence, written)
    return of_smooth(found, setting.model)


def weighted(local: dict[int, Tensor]) -> dict[int, Tensor]:
    """(L − l) δ_l^local by layer."""
    last = max(local)
    return {layer: (last - layer) * offset for layer, offset in local.items()}


def _as_written(made: Runs, setting: Setting, tuned: Path) -> AsWritten:
    """Exact offsets of the unsteered run, at full size."""
    exact = {layer: shift.exact for layer, shift in at_block_out(setting).items()}
    steered = apart(made, tuned, made.steered(exact))
    unsteered = apart(made, tuned, made.steered({}))
    times = steered / unsteered if unsteered else 0.0
    return AsWritten(
        Verdict.FAILS if times > CAPTURED else Verdict.HOLDS,
        f"offsets of the unsteered run at every block leave {figure(times)} times the "
        "KL of no steering",
        {"KL over that of no steering": times},
    )
