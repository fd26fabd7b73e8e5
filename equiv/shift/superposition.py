"""Superposition: the first-order equivalence at the model's output.

Symbols
    δ_k         local first-order shift of stage k: its own ΔW, its input at the base
    J_{out←k}   Jacobian of the output in stage k's output, at the base

    JVP of the whole model in direction ΔW  =  Σ_k J_{out←k} δ_k

Each δ_k is carried to the output by itself, by `jvp` in the activations alone. Carried
together they would be the recursion that defines the left side, and could not differ
from it. The identity is exact, so the two sides differ by rounding only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import jvp

from equiv.model.stages import Stage, StagedModel
from equiv.shift.measures import Comparison, counted
from equiv.shift.propagate import propagate
from equiv.shift.results import Superposition, Verdict
from equiv.shift.traces import Point, Trace
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
    streams = [_Carried() for _ in cut.batches]
    sums = Comparison()
    points = (Point(0.0, True),)
    touched = 0
    for stage, tensors, traces in propagate(cut, update, points, low=low, local=points):
        for trace in traces:
            stream = streams[trace.batch]
            touched += trace.touched and trace.batch == 0
            moved = _moved(cut, stage, tensors, trace, stream)
            if cut.output_site not in (site := trace.values[0.0]):
                stream.deltas = list(moved)
                stream.hidden = site[stage.output]
            elif trace.tangents:
                whole = trace.tangents[0.0][cut.output_site]
                total = torch.zeros_like(whole)
                for delta in moved:
                    total += delta
                mask = cut.batches[trace.batch].mask
                sums.add(counted(whole, mask), counted(total, mask))
    return _judged(cut, sums, touched)


@dataclass
class _Carried:
    """One batch: the input of a stage, and the first-order shifts made below it."""

    hidden: Tensor | None = None
    deltas: list[Tensor] = field(default_factory=list)


def _moved(
    cut: StagedModel,
    stage: Stage,
    tensors: Mapping[str, Tensor],
    trace: Trace,
    stream: _Carried,
) -> Iterator[Tensor]:
    """Every shift carried through a stage by itself, and the stage's own."""
    noted = cut.notebooks(stage, tensors)
    still = {name: torch.zeros_like(value) for name, value in noted.items()}

    def run(x: Tensor, own: dict[str, Tensor]) -> Tensor:
        return cut.run(stage, {**tensors, **own}, x, trace.batch)[0]

    for delta in stream.deltas:
        yield jvp(run, (stream.hidden, noted), (delta, still))[1]
    if trace.touched:
        yield trace.local_tangents[0.0][stage.output]


def _judged(cut: StagedModel, sums: Comparison, stages: int) -> Superposition:
    relative = sums.relative_remainder
    if relative is None:
        reason = "the first-order shift of the output is zero"
        return Superposition(Verdict.NOT_APPLICABLE, reason, None, stages)
    limit = ROUNDINGS * torch.finfo(cut.dtype).eps
    if relative <= limit:
        reason = f"the sum over {stages} stages is the whole JVP, to rounding"
        return Superposition(Verdict.HOLDS, reason, relative, stages)
    reason = (
        f"the sum over {stages} stages differs from the whole JVP by {relative:.1e}, "
        f"expected at most {limit:.0e}"
    )
    return Superposition(Verdict.FAILS, reason, relative, stages)
