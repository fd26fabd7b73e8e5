"""Claim 11: the first-order shift is the sum of what each block's own update does."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from equiv.report.numbers import figure
from equiv.theory.approaches import CAPTURED
from equiv.theory.orders import OFF, SCALES, decay
from equiv.theory.parts import in_layer, outside_blocks
from equiv.theory.registry import claim
from equiv.theory.setting import Setting
from equiv.theory.smoothness import of_smooth
from equiv.theory.steered_runs import (
    Path,
    Runs,
    local_offsets,
    output,
    runs,
    size,
    slope,
)
from equiv.theory.values import ClaimResult, Value, Verdict

OUTSIDE = "outside the blocks"


@claim(
    11,
    title="first-order shifts of single blocks add up to that of the whole update",
    formula="δ_out = Σ_l J_(out←l) δ_l^local; shifts of single blocks mix at order t²",
    assumptions="J acts on all positions together",
    source="this project",
    falsified_by="a first-order difference above rounding, or mixing of order 1",
    derivation="""
        The output is a function of all weights, so its derivative along ΔW is the sum
        of those along each block's part: nothing of first order mixes two blocks. The
        part of block l reaches the output through the stream after block l alone, where
        it is δ_l^local; J_(out←l) is the derivative of all that follows. Attention
        makes it mix positions: J at one position alone is not enough.

        At finite t the shifts of two blocks' updates together differ from the sum of
        their own by t² D²z[ΔW_k, ΔW_l] + O(t³).
    """,
)
def superposition(setting: Setting) -> ClaimResult:
    """One derivative in the weights, against one per block in the activations."""
    model, update = setting.model, setting.update
    local = local_offsets(setting)
    found = {f"block {layer}": in_layer(model, update, layer) for layer in local}
    found[OUTSIDE] = outside_blocks(model, update)
    parts = {name: part for name, part in found.items() if part is not None}
    with runs(setting) as made:
        tuned = made.tuned(update)
        alone = {name: made.tuned(part) for name, part in parts.items()}
        sums = [_sum(made, local, alone, n) for n in made.batches]
        whole = size(made, setting.norm, lambda n: slope(tuned, n))
        if not whole:
            return ClaimResult(
                Verdict.INCONCLUSIVE, "the first-order change of the output is zero"
            )
        gap = size(made, setting.norm, lambda n: slope(tuned, n) - sums[n]) / whole

        def mixed(n: int, t: float) -> Tensor:
            shifts = [output(path, n, t) - made.base[n] for path in alone.values()]
            return output(tuned, n, t) - made.base[n] - torch.stack(shifts).sum(0)

        left = {t: size(made, setting.norm, partial(mixed, t=t)) for t in SCALES}
        order = decay(left, made.rounding(setting.norm))
    evidence: dict[str, Value] = {
        "Σ_l J δ_l against the whole derivative": gap,
        "parts": [*parts],
        "mixed part of the change at t = 1/16": left[SCALES[0]] / whole / SCALES[0],
        "order of the mixed part": order and order.to_dict(),
    }
    exact = gap <= CAPTURED
    slow = order is not None and order.order < 2 - OFF
    mixing = f"mixing of order {order.order:.2f}" if order else "nothing mixes"
    says = f"the sum over {len(parts)} parts is off by {figure(gap, 2)}; {mixing}"
    verdict = Verdict.HOLDS if exact and not slow else Verdict.FAILS
    return of_smooth(ClaimResult(verdict, says, {}, evidence), model)


def _sum(
    made: Runs, local: Mapping[int, Tensor], alone: Mapping[str, Path], batch: int
) -> Tensor:
    """Σ_l J_(out←l) δ_l^local, each carried by itself."""
    carried = [
        slope(made.steered({layer: offset}), batch)
        for layer, offset in local.items()
        if f"block {layer}" in alone
    ]
    if OUTSIDE in alone:
        carried.append(slope(alone[OUTSIDE], batch))
    return torch.stack(carried).sum(0)
