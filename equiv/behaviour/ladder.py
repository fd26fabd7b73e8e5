"""The ladder: what each way of steering recovers of the update's behaviour.

Rungs, per site and for all layers together: unsteered · vector · affine of rank 1, r
and full rank, fitted sequentially · the first-order, midpoint and exact oracle, which
set the site's activation to base + shift, per token, without any parametrisation ·
simultaneous offsets, which add to every layer the exact shift that was seen there in
the unsteered model. Besides, each single layer steered alone.

Offsets are what people take from two models that each ran alone. What is added at one
layer moves all layers above by itself, so that the shift of layer l is counted once
more at every steered layer above it: with L layers Σ_l (L − l) J δ_l arrives instead
of Σ_l J δ_l, to first order in the blocks' own shifts δ_l.

Fits see the fitting sequences only. Each fitted rung is run on the held-out sequences
at several strengths, 0 (no steering) among them, and the best is reported, with the
strength: least-squares steering can be worse than none. The strength is chosen on the
sequences that it is reported on, from a handful of values.

All steered streams pass each block together with the engine's own; what is kept is one
hidden state per stream, so memory is (streams × tokens × d) and streams are about
5 per fitted rung.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from equiv.behaviour.distance import Distances
from equiv.model.sites import LOGITS, Site, Steer
from equiv.model.stages import Stage, StagedModel
from equiv.shift.traces import Trace
from equiv.steering.fits.chain import Chain, Spec, Stream, aim, everywhere
from equiv.steering.fits.moments import Moments, Regression
from equiv.steering.forms.form import Steering
from equiv.steering.forms.oracle import Offset, Overwrite

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
OFFSETS = "simultaneous offsets"
ORACLES = ("first-order oracle", "midpoint oracle", "exact oracle", OFFSETS)


@dataclass(frozen=True)
class Label:
    """Names one steered model: site, rung, layers ("all" or an index), strength."""

    site: str
    rung: str
    layers: str = "all"
    strength: float | None = None


@dataclass
class _Single:
    """One layer steered alone; joins its stream at that layer."""

    layer: int
    site: str
    strength: float
    stream: Stream


@dataclass
class Ladder:
    """Every steered stream of one check; fed by the engine's traces.

    Attributes:
        distances: Per label, the figures against the tuned model.
        unsteered: Those of the base model.
        steering: Per label of a fitted rung at full strength, what was fitted.
    """

    cut: StagedModel
    sites: Sequence[str]
    specs: Sequence[Spec]
    midpoint: bool
    single: Spec | None = None  # form, rank and target of the single-layer steers
    distances: dict[Label, Distances] = field(default_factory=dict)
    unsteered: Distances | None = None
    num_parameters: dict[Label, int] = field(default_factory=dict)
    targets: dict[Label, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chains = [
            Chain(self.cut, everywhere(self.cut, spec), STRENGTHS)
            for spec in self.specs
        ]
        held = tuple(i for i, b in enumerate(self.cut.batches) if b.held_out)
        left_out = set() if self.midpoint else {"midpoint oracle"}
        if self.cut.num_layers == 1:  # added to one layer, an offset sets it
            left_out.add(OFFSETS)
        kinds = [kind for kind in ORACLES if kind not in left_out]
        self.oracles = {
            Label(site, kind): Stream(held)
            for site in dict.fromkeys(Site(key).write for key in self.sites)
            for kind in kinds
        }
        self.singles: list[_Single] = []
        self.held = held

    def step(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        traces: Sequence[Trace],
        hidden: Mapping[int, Tensor],
        moments: Mapping[str, Moments],
    ) -> None:
        """Move every stream through a block.

        Args:
            stage: The block.
            tensors: Its base parameters.
            traces: The engine's traces of the block, one per batch.
            hidden: The base stream at the block's input, by batch.
            moments: Per site, moments of (activation, what a steer there aims at) on
                the unsteered stream, for the single-layer steers.
        """
        for chain in self.chains:
            chain.step(stage, tensors, traces)
        for label, stream in self.oracles.items():
            for trace in traces:
                if trace.batch not in stream.batches:
                    continue
                if trace.moved:
                    steer = {}
                    if label.site in stage.sites:
                        steer[label.site] = _oracle(label.rung, label.site, trace)
                    stream.advance(self.cut, stage, tensors, trace.batch, steer)
                else:
                    stream.follow(trace)
        self._single_step(stage, tensors, traces, hidden, moments)

    def _single_step(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        traces: Sequence[Trace],
        hidden: Mapping[int, Tensor],
        moments: Mapping[str, Moments],
    ) -> None:
        for single in self.singles:
            for batch in single.stream.batches:
                single.stream.advance(self.cut, stage, tensors, batch, {})
        if self.single is None or not any(trace.moved for trace in traces):
            return
        for site in self.sites:
            if site not in moments:
                continue
            spec = self.single
            regression = Regression(moments[site], spec.fixed_ridge)
            steering = regression.form(str(spec.form), spec.rank)
            for strength in STRENGTHS:
                stream = Stream(
                    self.held, {b: hidden[b] for b in self.held if b in hidden}
                )
                steer: Steer = {site: steering.scaled(strength)}
                for batch in self.held:
                    stream.advance(self.cut, stage, tensors, batch, steer)
                self.singles.append(_Single(stage.layer, site, strength, stream))
            label = Label(site, spec.rung, str(stage.layer), 1.0)
            self.num_parameters[label] = steering.num_parameters

    def enter(self, batch: int, hidden: Tensor) -> None:
        """Start every stream at the embedding's output."""
        for chain in self.chains:
            chain.enter(batch, hidden)
        for stream in self.oracles.values():
            if batch in stream.batches:
                stream.hidden[batch] = hidden

    def finish(self, stage: Stage, tensors: Mapping[str, Tensor], trace: Trace) -> None:
        """Run the head on every stream of one held-out batch, and compare.

        For a module that is one stage the streams already hold its output.
        """
        batch = trace.batch
        if batch not in self.held:
            return
        site = self.cut.output_site
        tuned, base = trace.values[1.0][site], trace.values[0.0][site]
        if self.unsteered is None:
            self.unsteered = self._distances(tuned)
        self._add(self.unsteered, tuned, base, batch)
        for label, stream in self._streams():
            output = stream.hidden[batch]
            if stage.name == "head":
                output, _ = self.cut.run(stage, tensors, output, batch)
            found = self.distances.setdefault(label, self._distances(tuned))
            self._add(found, tuned, output, batch)

    def _streams(self) -> list[tuple[Label, Stream]]:
        found = list(self.oracles.items())
        for spec, chain in zip(self.specs, self.chains, strict=True):
            aimed = aim(self.cut, spec.site, spec.target)
            for strength, stream in chain.held_out.items():
                label = Label(spec.site, spec.rung, "all", strength)
                self.num_parameters[label] = _count(chain.steering.values())
                self.targets[label] = "block" if aimed == "block_out" else "shift"
                found.append((label, stream))
        for one in self.singles:
            assert self.single is not None
            label = Label(one.site, self.single.rung, str(one.layer), one.strength)
            aimed = aim(self.cut, one.site, self.single.target)
            self.targets[label] = "block" if aimed == "block_out" else "shift"
            found.append((label, one.stream))
        return found

    def _distances(self, output: Tensor) -> Distances:
        # One logit alone is no distribution: a regression's output.
        classes = self.cut.output_site == LOGITS and output.shape[-1] > 1
        return Distances(has_logits=classes)

    def _add(self, found: Distances, tuned: Tensor, out: Tensor, batch: int) -> None:
        entry = self.cut.batches[batch]
        found.add(tuned, out, entry.mask, entry.labels)


def _oracle(rung: str, site: str, trace: Trace) -> Steering:
    base, tuned = trace.values[0.0][site], trace.values[1.0][site]
    if rung == OFFSETS:
        return Offset(tuned - base)
    if rung == "exact oracle":
        return Overwrite(tuned)
    at = 0.5 if rung == "midpoint oracle" else 0.0
    return Overwrite(base + trace.tangents[at][site])


def _count(steering: Sequence[Steering] | object) -> int:
    return sum(s.num_parameters for s in steering)  # pyright: ignore
