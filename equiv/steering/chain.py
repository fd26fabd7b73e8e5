"""Sequential fits: each block's steering is fitted on the stream steered below it.

Symbols
    h̃       the steered stream at a block's input
    x       what the steer reads: the activation at its read site on h̃
    y       what is missing where it writes: the tuned activation minus the steered
            stream's own

At `block_out` and, where nothing follows the addition, at `mlp_out`, what is added
reaches the block's output unchanged, so the target "block" is y at the block's output.
At `attn_out` and `mlp_in` a write passes through the MLP first; there the steer is
fitted to the site's own y whatever the target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from equiv.errors import ArgumentError
from equiv.model.sites import Site, SiteKey, Sites, Steer
from equiv.model.stages import Stage, StagedModel
from equiv.shift.measures import counted
from equiv.shift.traces import Trace
from equiv.steering.fits import RIDGE, Moments, Regression
from equiv.steering.forms import Steering
from equiv.steering.sinks import fitted_tokens, stream_of

TARGETS = ("block", "shift")


@dataclass(frozen=True)
class Spec:
    """Which steering: where, of what form and rank, aiming at what."""

    site: str
    form: str
    rank: int | None  # None: full rank (affine), or a vector
    target: str = "block"
    ridge: float = RIDGE
    first_position: bool | None = None

    @property
    def rung(self) -> str:
        """Its name on the ladder."""
        if self.form == "vector":
            return "vector"
        return "affine full" if self.rank is None else f"affine r{self.rank}"


def writes_through(cut: StagedModel, site: str) -> bool:
    """Whether what is added at a write site reaches the block's output unchanged."""
    if cut.blocks is None:
        return False
    return site == "block_out" or (
        site == "mlp_out" and cut.blocks.architecture.plain_add
    )


def aim(cut: StagedModel, site: str, target: str) -> str:
    """The site whose missing shift a steer at `site` is fitted to when applied.

    Args:
        cut: The model.
        site: Where it reads and writes, as `Site.key`.
        target: "block" or "shift".
    """
    if target not in TARGETS:
        raise ArgumentError(f"Expected target in {', '.join(TARGETS)}, got {target!r}.")
    write = Site(site).write
    return "block_out" if target == "block" and writes_through(cut, write) else write


@dataclass
class Stream:
    """One steered continuation: the hidden state of each of its batches."""

    batches: tuple[int, ...]
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def follow(self, trace: Trace) -> None:
        """Stay on the base stream, which the update has not reached yet."""
        if trace.batch in self.batches:
            self.hidden[trace.batch] = trace.values[0.0][trace.stage.output]

    def advance(
        self,
        cut: StagedModel,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        batch: int,
        steer: Steer,
    ) -> tuple[Tensor, Sites]:
        """Run a stage on the stream with steering; the stream moves on."""
        out, sites = cut.run(stage, tensors, self.hidden.get(batch), batch, steer=steer)
        self.hidden[batch] = out
        return out, sites


class Chain:
    """A sequential fit under way: one `step` per block, bottom to top."""

    def __init__(
        self,
        cut: StagedModel,
        spec: Spec,
        strengths: Sequence[float] = (),
        layers: Sequence[int] | None = None,
    ) -> None:
        fit = tuple(i for i, b in enumerate(cut.batches) if not b.held_out)
        held = tuple(i for i, b in enumerate(cut.batches) if b.held_out)
        self.cut, self.spec = cut, spec
        self.aim = aim(cut, spec.site, spec.target)
        self.fitted = Stream(fit)
        self.held_out = {strength: Stream(held) for strength in strengths}
        self.steering: dict[SiteKey, Steering] = {}
        self.layers = frozenset(cut.layers if layers is None else layers)

    def enter(self, batch: int, hidden: Tensor) -> None:
        """Start from the embedding's output, which no steering has touched."""
        for stream in (self.fitted, *self.held_out.values()):
            if batch in stream.batches:
                stream.hidden[batch] = hidden

    def step(
        self, stage: Stage, tensors: Mapping[str, Tensor], traces: Sequence[Trace]
    ) -> None:
        """Fit this block's steering and move every stream through the block."""
        if not any(trace.moved for trace in traces):
            for trace in traces:
                for stream in (self.fitted, *self.held_out.values()):
                    stream.follow(trace)
            return
        if stage.layer not in self.layers:
            for stream in (self.fitted, *self.held_out.values()):
                for batch in stream.batches:
                    stream.advance(self.cut, stage, tensors, batch, {})
            return
        tuned = {trace.batch: trace.values[1.0] for trace in traces}
        steering = self._fit(stage, tensors, tuned)
        self.steering[stage.layer, self.spec.site] = steering
        for batch in self.fitted.batches:
            self._move(self.fitted, stage, tensors, batch, steering)
        for strength, stream in self.held_out.items():
            scaled = steering.scaled(strength)
            for batch in stream.batches:
                self._move(stream, stage, tensors, batch, scaled)

    def _fit(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        tuned: Mapping[int, Sites],
    ) -> Steering:
        moments, spec = Moments(), self.spec
        read = Site(spec.site).read
        for batch in self.fitted.batches:
            hidden = self.fitted.hidden.get(batch)
            _, sites = self.cut.run(stage, tensors, hidden, batch)
            missing = tuned[batch][self.aim] - sites[self.aim]
            keep = fitted_tokens(
                self.cut.batches[batch].mask,
                stream_of(sites, read),
                first_position=spec.first_position,
            )
            moments.add(counted(sites[read], keep), counted(missing, keep))
        return Regression(moments, spec.ridge).form(spec.form, spec.rank)

    def _move(
        self,
        stream: Stream,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        batch: int,
        steering: Steering,
    ) -> None:
        stream.advance(self.cut, stage, tensors, batch, {self.spec.site: steering})
