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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from equiv.errors import ArgumentError
from equiv.model.sites import Site, SiteKey, Sites, Steer
from equiv.model.stages import Stage, StagedModel
from equiv.shift.measures import counted
from equiv.shift.traces import Trace
from equiv.steering.fits.fitter import Asked, Fitted, Fitter, Form
from equiv.steering.fits.moments import RIDGE
from equiv.steering.fits.sinks import fitted_tokens, stream_of
from equiv.steering.forms.form import Steering

TARGETS = ("block", "shift")


@dataclass(frozen=True)
class Spec:
    """Which steering: where, of what form and rank, aiming at what.

    Attributes:
        site: Where it reads and writes, as `Site.key`.
        form: One of `equiv.steering.fits.fitter.FITTED`, or a module.
        rank: Rank of the map; `None` for full rank, or where the form has none.
        target: "block" or "shift"; see `aim`.
        ridge: Relative ridge; `None` to choose it.
        first_position: Whether the first token of each sequence is fitted.
        activation: Of a low-rank MLP.
    """

    site: str
    form: Form
    rank: int | None
    target: str = "block"
    ridge: float | None = RIDGE
    first_position: bool | None = None
    activation: str = "silu"

    @property
    def rung(self) -> str:
        """Its name on the ladder."""
        if not isinstance(self.form, str):
            return "own form"
        if self.form in ("vector", "heads"):
            return self.form
        return f"{self.form} full" if self.rank is None else f"{self.form} r{self.rank}"

    @property
    def fixed_ridge(self) -> float:
        """The ridge that was given, or the one that is taken without choosing."""
        return RIDGE if self.ridge is None else self.ridge

    def fitter(self, cut: StagedModel, layer: int) -> Fitter:
        """A fitter of this form for a layer of a model."""
        heads = None
        if self.form == "heads":
            config = getattr(cut.model, "config", None)
            heads = getattr(config, "num_attention_heads", None)
            if cut.decodes(layer):
                heads = getattr(config, "decoder_attention_heads", heads)
            if heads is None:
                raise ArgumentError(
                    f"{type(cut.model).__name__} does not say how many heads it has: "
                    'form="heads" needs a Hugging Face model.'
                )
        return Fitter(Asked(self.form, self.rank, self.ridge, self.activation, heads))


def writes_through(cut: StagedModel, site: str) -> bool:
    """Whether what is added at a write site reaches the block's output unchanged."""
    if cut.blocks is None:
        return False
    known = cut.blocks.architecture
    if site == "attn_out":  # in parallel blocks the MLP does not read it
        return known.parallel and known.plain_add
    return site == "block_out" or (site == "mlp_out" and known.plain_add)


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


Plan = Mapping[int, Sequence[Spec]]


class Chain:
    """A sequential fit under way: one `step` per block, bottom to top.

    Attributes:
        steering: What is fitted so far.
        fits: How each fit went.
    """

    def __init__(
        self,
        cut: StagedModel,
        plan: Plan,
        strengths: Sequence[float] = (),
        choosing: Iterable[int] = (),
    ) -> None:
        """Start.

        Args:
            cut: The model.
            plan: Layer → steers, in the order in which the block comes to them.
            strengths: At which the held-out batches are steered.
            choosing: Batches that choose the ridge, where it is not given.
        """
        fit = tuple(i for i, b in enumerate(cut.batches) if not b.held_out)
        held = tuple(i for i, b in enumerate(cut.batches) if b.held_out)
        self.cut, self.plan = cut, plan
        self.fitted = Stream(fit)
        self.held_out = {strength: Stream(held) for strength in strengths}
        self.steering: dict[SiteKey, Steering] = {}
        self.fits: dict[SiteKey, Fitted] = {}
        self.choosing = frozenset(choosing)

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
        tuned = {trace.batch: trace.values[1.0] for trace in traces}
        steers: dict[str, Steering] = {}
        for spec in self.plan.get(stage.layer, ()):
            found = self._fit(stage, tensors, tuned, spec, steers)
            steers[spec.site] = found.steering
            self.steering[stage.layer, spec.site] = found.steering
            self.fits[stage.layer, spec.site] = found
        for batch in self.fitted.batches:
            self.fitted.advance(self.cut, stage, tensors, batch, steers)
        for strength, stream in self.held_out.items():
            scaled = {site: s.scaled(strength) for site, s in steers.items()}
            for batch in stream.batches:
                stream.advance(self.cut, stage, tensors, batch, scaled)

    def _fit(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        tuned: Mapping[int, Sites],
        spec: Spec,
        steers: Steer,
    ) -> Fitted:
        """Fit one steer on the stream, with the block's earlier ones applied."""
        fitter = spec.fitter(self.cut, stage.layer)
        aimed, read = aim(self.cut, spec.site, spec.target), Site(spec.site).read
        for batch in self.fitted.batches:
            hidden = self.fitted.hidden.get(batch)
            _, sites = self.cut.run(stage, tensors, hidden, batch, steer=steers)
            missing = tuned[batch][aimed] - sites[aimed]
            keep = fitted_tokens(
                self.cut.mask(stage, batch),
                stream_of(sites, read),
                first_position=spec.first_position,
            )
            fitter.add(
                counted(sites[read], keep),
                counted(missing, keep),
                choosing=batch in self.choosing,
            )
        return fitter.fit()


def everywhere(cut: StagedModel, spec: Spec) -> Plan:
    """The same steer in every layer that has its sites."""
    return dict.fromkeys(cut.layers_with(spec.site), (spec,))
