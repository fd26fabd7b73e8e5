"""Superposition: the first-order equivalence at the model's output.

Symbols
    δ_k         local first-order shift of stage k: its own ΔW, its input at the base
    J_{out←k}   Jacobian of the output in stage k's output, at the base

    JVP of the whole model in direction ΔW  =  Σ_k J_{out←k} δ_k

Each δ_k is carried to the output by itself, by `jvp` in the activations alone. Carried
together they would be the recursion that defines the left side, and could not differ
from it. The identity is exact, so the two sides differ by rounding only.
"""

import torch
from torch import Tensor
from torch.func import jvp

from equiv.model.stages import StagedModel
from equiv.shift.measures import counted
from equiv.shift.propagate import Point, propagate
from equiv.shift.results import Superposition, Verdict
from equiv.update.update import Update

# 1e-12 in float64: a few thousand roundings, for up to a dozen blocks of some ten
# operations each, at condition numbers that trained models have.
ROUNDINGS = 1e-12 / torch.finfo(torch.float64).eps
MAX_BLOCKS = 12


def superposition(
    cut: StagedModel, update: Update, *, low: tuple[str, ...] = ()
) -> Superposition:
    """Compare Σ_k J_{out←k} δ_k with the JVP of the whole model.

    Args:
        cut: The model cut into stages, with few tokens.
        update: An update that fits it.
        low: Names whose low-rank factors are applied beside the weight.

    Returns:
        The relative difference over the tokens that count, and its verdict.
    """
    carried: dict[int, list[Tensor]] = {i: [] for i in range(len(cut.batches))}
    inputs: dict[int, Tensor | None] = dict.fromkeys(range(len(cut.batches)))
    whole: dict[int, Tensor] = {}
    points = (Point(0.0, True),)
    site = cut.output_site
    touched = 0
    for stage, tensors, traces in propagate(cut, update, points, low=low, local=points):
        for trace in traces:
            batch, h = trace.batch, inputs[trace.batch]
            moved = []
            for delta in carried[batch]:

                def run(x: Tensor, batch: int = batch) -> Tensor:
                    return cut.run(stage, tensors, x, batch)[0]  # noqa: B023

                moved.append(jvp(run, (h,), (delta,))[1])
            carried[batch] = moved
            if trace.touched:
                touched += trace.batch == 0
                carried[batch].append(trace.local_tangents[0.0][stage.output])
            inputs[batch] = trace.values[0.0][stage.output]
            if site in trace.values[0.0] and trace.tangents:
                whole[batch] = trace.tangents[0.0][site]
    return _compare(cut, carried, whole, touched)


def _compare(
    cut: StagedModel,
    carried: dict[int, list[Tensor]],
    whole: dict[int, Tensor],
    stages: int,
) -> Superposition:
    difference = total = 0.0
    for batch, expected in whole.items():
        mask = cut.batches[batch].mask
        actual = torch.stack(carried[batch]).sum(0)
        expected_rows = counted(expected, mask)
        difference += float((counted(actual, mask) - expected_rows).square().sum())
        total += float(expected_rows.square().sum())
    if not total:
        reason = "the first-order shift of the output is zero"
        return Superposition(Verdict.NOT_APPLICABLE, reason, None, stages)
    relative = (difference / total) ** 0.5
    limit = ROUNDINGS * torch.finfo(cut.dtype).eps
    if relative <= limit:
        reason = f"the sum over {stages} stages is the whole JVP, to rounding"
        return Superposition(Verdict.HOLDS, reason, relative, stages)
    reason = (
        f"the sum over {stages} stages differs from the whole JVP by {relative:.1e}, "
        f"expected at most {limit:.0e}"
    )
    return Superposition(Verdict.FAILS, reason, relative, stages)
