"""Superposition: the first-order equivalence at the model's output.

Symbols
    δ_k         local first-order shift of stage k: its own ΔW, its input at the base
    J_{out←k}   Jacobian of the output in stage k's output, at the base

    JVP of the whole model in direction ΔW  =  Σ_k J_{out←k} δ_k

Each δ_k is carried to the output by itself, by `jvp` in the activations alone. Carried
together they would be the recursion that defines the left side, and could not differ
from it. The identity is exact, so the two sides differ by rounding only. What each δ_k
comes to at the output is kept, as `contributions.py` says.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from equiv.model.stages import Stage, StagedModel
from equiv.shift.contributions import Contributions, Sums
from equiv.shift.derivative import derived, pullback
from equiv.shift.measures import Comparison, counted
from equiv.shift.output_metric import metric_of
from equiv.shift.propagate import propagate
from equiv.shift.results import Superposition, Verdict
from equiv.shift.traces import Point, Trace
from equiv.update.update import Update

# 1e-12 in float64: a few thousand roundings, for a dozen blocks of some ten operations
# each, at condition numbers that trained models have; more blocks round more often.
ROUNDINGS = 1e-12 / torch.finfo(torch.float64).eps
ROUNDED_BLOCKS = 12
# Carrying every shift by itself takes half the square of these `jvp`s of a block; up to
# here that is no more than the Taylor test's on the same tokens.
MAX_BLOCKS = 48


def superposition(
    cut: StagedModel, update: Update, *, low: tuple[str, ...] = ()
) -> tuple[Superposition, Contributions | None]:
    """Compare Σ_k J_{out←k} δ_k with the JVP of the whole model.

    Args:
        cut: The model cut into stages, with few tokens.
        update: An update that fits it.
        low: Names whose low-rank factors are applied beside the weight.

    Returns:
        The relative difference over the tokens that count, with its verdict, and what
        each stage adds to the output (`None` where it does not move).
    """
    streams = [_Carried() for _ in cut.batches]
    sums = Comparison()
    parts = Sums()
    points = (Point(0.0, True),)
    touched = 0
    for stage, tensors, traces in propagate(cut, update, points, low=low, local=points):
        for trace in traces:
            stream, mask = streams[trace.batch], cut.batches[trace.batch].mask
            touched += trace.touched and trace.batch == 0
            site = trace.values[0.0]
            if cut.output_site not in site:
                stream.deltas = list(_moved(cut, stage, tensors, trace, stream))
                stream.hidden = site[stage.output]
            elif trace.tangents:
                total = _at_the_end(cut, stage, tensors, trace, stream, parts)
                whole = trace.tangents[0.0][cut.output_site]
                sums.add(counted(whole, mask), counted(total, mask))
    return _judged(cut, sums, touched), parts.result()


@dataclass
class _Carried:
    """One batch: the input of a stage, and the first-order shifts made below it."""

    hidden: Tensor | None = None
    deltas: list[tuple[int, Tensor]] = field(default_factory=list)


class _Linear:
    """A stage at the base as a linear map of what arrives: J, and Jᵀ when asked."""

    def __init__(
        self,
        cut: StagedModel,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        hidden: Tensor | None,
        batch: int,
    ) -> None:
        self.noted = cut.notebooks(stage, tensors)
        self.hidden = hidden
        self.run = lambda x, own: cut.run(stage, {**tensors, **own}, x, batch)[0]

    def forward(self, delta: Tensor) -> Tensor:
        still = {name: torch.zeros_like(value) for name, value in self.noted.items()}
        return derived(self.run, (self.hidden, self.noted), (delta, still))[1]

    def back(self, weights: Tensor) -> Tensor:
        return self._pull(weights)[0]

    @cached_property
    def _pull(self) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        return pullback(self.run, self.hidden, self.noted)


def _moved(
    cut: StagedModel,
    stage: Stage,
    tensors: Mapping[str, Tensor],
    trace: Trace,
    stream: _Carried,
) -> Iterator[tuple[int, Tensor]]:
    """Every shift carried through a stage by itself, and the stage's own.

    The two embeddings of an encoder–decoder count as one.
    """
    linear = _Linear(cut, stage, tensors, stream.hidden, trace.batch)
    own = trace.local_tangents[0.0][stage.output] if trace.touched else None
    for layer, delta in stream.deltas:
        carried = linear.forward(delta)
        if layer == stage.layer and own is not None:
            carried, own = carried + own, None
        yield layer, carried
    if own is not None:
        yield stage.layer, own


def _at_the_end(
    cut: StagedModel,
    stage: Stage,
    tensors: Mapping[str, Tensor],
    trace: Trace,
    stream: _Carried,
    parts: Sums,
) -> Tensor:
    """Σ_k J_{out←k} δ_k of one batch; what its parts come to is added up."""
    linear = _Linear(cut, stage, tensors, stream.hidden, trace.batch)
    site = cut.output_site
    own = (stage.layer, trace.local_tangents[0.0][site]) if trace.touched else None
    metric = metric_of(cut, trace.values[0.0][site], trace.batch)
    return parts.add(stream.deltas, own, linear.forward, linear.back, metric)


def _judged(cut: StagedModel, sums: Comparison, stages: int) -> Superposition:
    relative = sums.relative_remainder
    if relative is None:
        reason = "the first-order shift of the output is zero"
        return Superposition(Verdict.NOT_APPLICABLE, reason, None, stages)
    longer = max(1.0, cut.num_layers / ROUNDED_BLOCKS)
    limit = longer * ROUNDINGS * torch.finfo(cut.dtype).eps
    if relative <= limit:
        reason = f"the sum over {stages} stages is the whole JVP, to rounding"
        return Superposition(Verdict.HOLDS, reason, relative, stages)
    reason = (
        f"the sum over {stages} stages differs from the whole JVP by {relative:.1e}, "
        f"expected at most {limit:.0e}"
    )
    return Superposition(Verdict.FAILS, reason, relative, stages)
