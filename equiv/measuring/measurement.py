"""One check under way: the calculus on few tokens, then the full pass."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from equiv.behaviour.ladder import Ladder
from equiv.behaviour.spectra import RANKS, TOKENS, Spectrum, spectra
from equiv.measuring.subject import subject_of, width_of
from equiv.model.batches import Batch, at_most, split
from equiv.model.packed import packed_kinds
from equiv.model.sites import FLOW, read_and_written
from equiv.model.stages import StagedModel, staged
from equiv.progress import Progress
from equiv.report import assemble
from equiv.report.report import Report
from equiv.report.values import Contributions, Radius, Superposition
from equiv.settings import Settings
from equiv.shift.calculus import Curve, RowKey, Selection, curves
from equiv.shift.derivative import CENTRAL, NoReverseRuleError
from equiv.shift.differences import step_of
from equiv.shift.flips import Flips
from equiv.shift.propagate import propagate
from equiv.shift.radius import Question, radii
from equiv.shift.silent import check_derivative
from equiv.shift.stage_update import low_rank_names
from equiv.shift.superposition import MAX_BLOCKS, superposition
from equiv.shift.table import Table
from equiv.shift.traces import BASE, MIDPOINT, TUNED
from equiv.steering.fits.chain import Spec
from equiv.steering.fits.table import MomentTable
from equiv.update.update import Update

HELD_OUT = 0.25
CALCULUS_TOKENS = 256
# Sites of a plain module that get fits and behaviour; rows have no limit.
MODULE_SITES = 12


@dataclass
class Calculus:
    """What is found on few tokens, in float64."""

    curves: dict[RowKey, Curve]
    superposition: Superposition | None
    contributions: Contributions | None
    tokens: int


class Measurement:
    """A model, its update and inputs, measured as the settings say.

    `kind` is where the inputs come from ("random": only the calculus is measured);
    `bar` shows progress.
    """

    def __init__(
        self,
        model: nn.Module,
        update: Update,
        settings: Settings,
        batches: list[Batch],
        layers: Sequence[int] | None,
        kind: str,
        bar: Progress,
    ) -> None:
        self.bar = bar
        self.model, self.update, self.settings = model, update, settings
        self.kind = kind
        self.batches = split(batches, HELD_OUT, settings.seed)
        self.layers = layers
        self.low = low_rank_names(model, update)
        self.notes: list[str] = []
        if kinds := packed_kinds(model):
            self.notes.append(
                f"the base is quantised ({', '.join(kinds)}): measured with the values "
                "its weights stand for, and without rounding of activations"
            )

    def _staged(self, batches: list[Batch], dtype: torch.dtype) -> Any:
        return staged(
            self.model,
            batches,
            dtype,
            sites=self.settings.sites,
            low_names=self.low,
        )

    def _selection(self, cut: StagedModel) -> Selection:
        layers = cut.layers if self.layers is None else self.layers
        sites = read_and_written(self._asked_sites(cut))
        if cut.blocks is not None:
            sites = tuple(sorted(sites, key=FLOW.index))
        return Selection(frozenset(layers), sites)

    def _asked_sites(self, cut: StagedModel) -> tuple[str, ...]:
        return tuple(self.settings.sites or cut.stages[0].sites)

    def calculus(self) -> Calculus:
        """Orders and superposition in float64, on at most 256 tokens."""
        settings = self.settings
        few = at_most(self.batches, CALCULUS_TOKENS, settings.seed)
        tokens = sum(batch.tokens for batch in few)
        if settings.derivative == CENTRAL:
            size = step_of(self.update, self.model, settings.order_dtype)
            self.notes.append(
                f"derivatives by central differences, at t = {size:.1e} in the orders; "
                "superposition and contributions, which need exact ones, not measured"
            )
        else:
            check_derivative(
                self.model, self.update, few, settings.order_dtype, self.low
            )
        with self._staged(few, settings.order_dtype) as cut:
            selection = self._selection(cut)
            found = curves(
                cut,
                self.update,
                low=self.low,
                selection=selection,
                midpoint=settings.midpoint,
                derivative=settings.derivative,
            )
            together, parts = self._superposition(cut)
        self.bar.step("orders")
        return Calculus(found, together, parts, tokens)

    def _superposition(
        self, cut: StagedModel
    ) -> tuple[Superposition | None, Contributions | None]:
        if cut.blocks is None or cut.num_layers > MAX_BLOCKS:
            return None, None
        if self.settings.derivative == CENTRAL:
            return None, None
        try:
            return superposition(cut, self.update, low=tuple(self.low))
        except NoReverseRuleError as error:
            self.notes.append(f"superposition not measured: no reverse rule ({error})")
            return None, None

    def report(self, calculus: Calculus) -> Report:
        """The full pass, and everything put together."""
        settings = self.settings
        dtype = settings.full_dtype(calculus.curves)
        if settings.dtype is None and dtype == torch.float64:
            self.notes.append(
                "measured in float64 throughout: the update is too small for float32"
            )
        with self._staged(self.batches, dtype) as cut:
            selection = self._selection(cut)
            table = Table(selection, flips=Flips(cut.gates))
            sites = self._steered_sites(self._asked_sites(cut))
            specs = settings.specs(sites, width_of(self.model))
            moments = MomentTable(cut, sites, settings.target)
            ladder = self._ladder(cut, specs, sites)
            self._full_pass(cut, table, moments, ladder)
            self._note_silent_routers(cut, table)
            reach = self._radii(cut, table, calculus)
            plain_add = bool(cut.blocks and cut.blocks.architecture.plain_add)
            parameters = sum(p.numel() for p in self.model.parameters())
            report = Report(
                subject=subject_of(
                    cut, self.update, settings, self.kind, calculus.tokens
                ),
                rows=assemble.rows(
                    table.rows,
                    calculus.curves,
                    reach,
                    midpoint=settings.midpoint,
                    dtype=dtype,
                    order_dtype=settings.order_dtype,
                ),
                coverage=assemble.coverage(table.coverage, plain_add),
                fits=assemble.fits(moments, specs),
                behaviour=()
                if ladder is None
                else assemble.behaviour(
                    ladder, specs, model_parameters=parameters, seed=settings.seed
                ),
                superposition=calculus.superposition,
                contributions=calculus.contributions,
                first_positions=assemble.first_positions(table.streams),
                routing=assemble.routing(table.flips),
                notes=tuple(self.notes),
            )
        try:
            found = self._spectra(moments, specs, dtype)
        except NoReverseRuleError as error:
            self.notes.append(f"spectra not measured: no reverse rule ({error})")
            return replace(report, notes=tuple(self.notes))
        return replace(report, spectra=found)

    def _note_silent_routers(self, cut: StagedModel, table: Table) -> None:
        if silent := sorted(cut.gates.keys() - table.flips.counts.keys()):
            layers = ", ".join(map(str, silent))
            self.notes.append(
                f"tokens that change experts not counted at layers {layers}: routers "
                "there do not say whom they choose"
            )

    def _spectra(
        self, moments: MomentTable, specs: Sequence[Spec], dtype: torch.dtype
    ) -> tuple[Spectrum, ...]:
        """What steering of every size leaves, on few held-out sequences."""
        held = [batch for batch in self.batches if batch.held_out]
        if not held or not specs or moments.cut.blocks is None:
            return ()
        few = at_most(held, TOKENS, self.settings.seed)
        ranks = RANKS if any(spec.form == "affine" for spec in specs) else 0
        with self._staged(few, dtype) as cut:
            return spectra(
                cut,
                self.update,
                moments,
                ridge=specs[0].fixed_ridge,
                ranks=ranks,
                low=tuple(self.low),
                seed=self.settings.seed,
            )

    def _steered_sites(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        if self.kind == "random":
            self.notes.append(
                "not measured: random inputs (radius, fits and behaviour need real "
                'ones: pass `inputs=`, for instance texts, or "samples")'
            )
            return ()
        if len(asked) > MODULE_SITES:
            self.notes.append(
                f"fits and behaviour for the first {MODULE_SITES} of "
                f"{len(asked)} sites; choose others with `sites=`"
            )
        return asked[:MODULE_SITES]

    def _ladder(
        self, cut: StagedModel, specs: Sequence[Spec], sites: Sequence[str]
    ) -> Ladder | None:
        if self.kind == "random":
            return None
        if reason := self._no_ladder(specs, sites):
            self.notes.append(f"behaviour not measured: {reason}")
            return None
        ranked = [s for s in specs if s.form == "affine" and s.rank is not None]
        single = max(ranked, key=lambda s: s.rank or 0, default=specs[0])
        if cut.blocks is None:
            single = None
        return Ladder(cut, sites, specs, self.settings.midpoint, single)

    def _no_ladder(self, specs: Sequence[Spec], sites: Sequence[str]) -> str:
        if not sites:
            return "no site lies before the output"
        if not specs:
            return "no forms of steering were asked for (`forms=()`)"
        if not any(batch.held_out for batch in self.batches):
            return "fewer than two sequences, so none can be held out"
        return ""

    def _radii(
        self, cut: StagedModel, table: Table, calculus: Calculus
    ) -> dict[Question, Radius]:
        if self.kind == "random":
            return {}
        found = radii(
            cut,
            self.update,
            table.rows,
            calculus.curves,
            low=self.low,
            selection=self._selection(cut),
            midpoint=self.settings.midpoint,
            flips=table.flips,
            derivative=self.settings.derivative,
        )
        self.bar.step("radii")
        return found

    def _full_pass(
        self,
        cut: StagedModel,
        table: Table,
        moments: MomentTable,
        ladder: Ladder | None,
    ) -> None:
        points = (BASE, MIDPOINT, TUNED) if self.settings.midpoint else (BASE, TUNED)
        hidden: dict[int, Tensor] = {}
        passes = propagate(
            cut,
            self.update,
            points,
            low=self.low,
            local=points,
            derivative=self.settings.derivative,
        )
        self.bar.more(len(cut.stages))
        for stage, tensors, traces in self._shown(passes):
            kept = []
            for trace in traces:
                table.add(trace, cut.mask(stage, trace.batch))
                if stage.name in ("block", "module"):
                    moments.add(stage, trace)
                if ladder is None:
                    continue
                if stage.name == "embed":
                    ladder.enter(trace.batch, trace.values[0.0][stage.output])
                elif stage.name == "head":
                    ladder.finish(stage, tensors, trace)
                    continue
                kept.append(trace)
            if ladder is None or stage.name == "head":
                continue
            if stage.name != "embed":
                fitted = moments.applied(stage.layer)
                ladder.step(stage, tensors, kept, hidden, fitted)
            if stage.name == "module":
                for trace in kept:
                    ladder.finish(stage, tensors, trace)
            hidden = {t.batch: t.values[0.0][stage.output] for t in kept}

    def _shown(self, passes: Iterator[Any]) -> Iterator[Any]:
        for entry in passes:
            yield entry
            stage = entry[0]
            self.bar.step(
                f"block {stage.layer}" if stage.name == "block" else "full pass"
            )
