"""`equiv.check`: the one verb. Measures everything and returns a `Report`."""

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.func import functional_call

from equiv.arguments import (
    as_choice,
    as_dtype,
    as_integer,
    as_layers,
    as_names,
    as_number,
    as_seed,
)
from equiv.behaviour.ladder import Ladder
from equiv.errors import InputsError, SiteError
from equiv.model.batches import Batch, at_most, split
from equiv.model.drawn import random_inputs, sampled
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import SITES
from equiv.model.stages import StagedModel, staged
from equiv.report import assemble
from equiv.report.report import Report
from equiv.report.values import Radius, Subject, Superposition
from equiv.shift.calculus import Curve, RowKey, Selection, curves
from equiv.shift.propagate import (
    BASE,
    MIDPOINT,
    TUNED,
    low_rank_names,
    propagate,
)
from equiv.shift.radius import TOLERANCE, Question, radii
from equiv.shift.superposition import MAX_BLOCKS, superposition
from equiv.shift.table import Table
from equiv.steering.chain import TARGETS, Spec
from equiv.steering.forms import FORMS
from equiv.steering.table import MomentTable
from equiv.update.low_rank import LowRank
from equiv.update.sources import resolve
from equiv.update.update import Update

HELD_OUT = 0.25
CALCULUS_TOKENS = 256
# Sites of a plain module that get fits and behaviour; rows have no limit.
MODULE_SITES = 12
_AT = ("both", "base", "midpoint")


@dataclass(frozen=True)
class _Settings:
    sites: tuple[str, ...] | None
    forms: tuple[str, ...]
    rank: int
    target: str
    at: str
    max_remainder: float | None
    dtype: torch.dtype | None
    seed: int

    @property
    def midpoint(self) -> bool:
        return self.at != "base"

    @property
    def order_dtype(self) -> torch.dtype:
        return self.dtype or torch.float64

    def full_dtype(self, curves: Mapping[RowKey, Curve]) -> torch.dtype:
        """Float32 unless its rounding would be taken for the update's remainder."""
        small = any(curve.needs_float64(TOLERANCE) for curve in curves.values())
        return self.dtype or (torch.float64 if small else torch.float32)

    def specs(self, sites: Sequence[str], width: int | None) -> list[Spec]:
        """The fitted rungs of the ladder, per site."""
        made = []
        for site in sites:
            if "vector" in self.forms:
                made.append(Spec(site, "vector", None, self.target))
            if "affine" in self.forms:
                ranks = sorted({1, min(self.rank, width or self.rank)})
                for rank in (*ranks, None):
                    made.append(Spec(site, "affine", rank, self.target))
        return made


def check(
    model: nn.Module,
    delta_w: object,
    inputs: object = None,
    *,
    sites: Sequence[str] | None = SITES,
    layers: Iterable[SupportsIndex] | None = None,
    forms: Sequence[str] = FORMS,
    rank: int = 8,
    target: str = "block",
    at: str = "both",
    max_remainder: float | None = 0.1,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Measure how far moving activations can stand in for a weight update.

    Args:
        model: A Hugging Face model of a known family, or any module. It is left
            exactly as it was.
        delta_w: The update: a mapping of parameter name → difference, an
            `equiv.Update`, a tuned model, a `PeftModel` (also one around this very
            model), or a path or hub id of any of these.
        inputs: `None` (drawn from the seed: good for the calculus only), `"samples"`
            (sampled from the base and the tuned model), texts with `tokenizer`, a
            tensor, a mapping of keyword arguments, or an iterable of those.
        sites: Where to measure and steer; see `equiv.model.sites`. For a plain module,
            names of submodules. `None` for all.
        layers: Blocks that become rows; `None` for all.
        forms: Forms of steering to fit: "vector", "affine".
        rank: Rank of the affine map; ranks 1 and full are measured beside it.
        target: "block": fits aim at the block output's shift, so that sites can be
            compared; "site": at the site's own.
        at: "both", "base" or "midpoint": where the derivative is taken. `holds` judges
            the base, with "midpoint" the midpoint.
        max_remainder: Largest relative remainder at full size for `holds`; `None` asks
            for the order alone.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype; `None` means order and superposition in float64 on at
            most 256 tokens, the rest in float32 with float64 sums (in float64 where
            the update is so small that float32's rounding would show).
        seed: Draws inputs, the held-out quarter and the bootstrap.
        progress: Whether to show a progress bar.

    Returns:
        The report.

    Raises:
        ArgumentError: If an argument is outside its set.
        UpdateError: If the update cannot be used.
        InputsError: If the inputs cannot be fed to the model.
        SiteError: If a layer or site does not exist.
        UnsupportedModelError: If the model cannot be measured.

    Example:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> report = check(model, Update.random(model, relative_norm=0.01, seed=0))
        >>> report.holds
        True
    """
    settings = _settings(sites, forms, rank, target, at, max_remainder, dtype, seed)
    check_model(model)
    update = resolve(model, delta_w)
    blocks = find_blocks(model)
    if settings.sites in (None, SITES):
        settings = replace(settings, sites=SITES if blocks else None)
    chosen = as_layers(layers, len(blocks.modules) if blocks else 1)
    with measured(model), _bar(progress) as bar:
        kind, batches = _inputs(model, update, inputs, tokenizer, settings.seed)
        run = _Run(model, update, settings, batches, chosen, kind, bar)
        _step(bar, "inputs")
        return run.report(run.calculus())


@dataclass
class _Calculus:
    curves: dict[RowKey, Curve]
    superposition: Superposition | None
    tokens: int


class _Run:
    """One check under way: the calculus on few tokens, then the full pass."""

    def __init__(
        self,
        model: nn.Module,
        update: Update,
        settings: _Settings,
        batches: list[Batch],
        layers: Sequence[int] | None,
        kind: str,
        bar: Any,
    ) -> None:
        self.bar = bar
        self.model, self.update, self.settings = model, update, settings
        self.kind = kind
        self.batches = split(batches, HELD_OUT, settings.seed)
        self.layers = layers
        self.low = low_rank_names(model, update)
        self.notes: list[str] = []

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
        sites = self.settings.sites or cut.stages[0].sites
        return Selection(frozenset(layers), tuple(sites))

    def calculus(self) -> _Calculus:
        """Orders and superposition in float64, on at most 256 tokens."""
        settings = self.settings
        few = at_most(self.batches, CALCULUS_TOKENS, settings.seed)
        tokens = sum(batch.tokens for batch in few)
        with self._staged(few, settings.order_dtype) as cut:
            selection = self._selection(cut)
            found = curves(
                cut,
                self.update,
                low=self.low,
                selection=selection,
                midpoint=settings.midpoint,
            )
            together = None
            if cut.blocks is not None and cut.num_layers <= MAX_BLOCKS:
                together = superposition(cut, self.update, low=tuple(self.low))
        _step(self.bar, "orders")
        return _Calculus(found, together, tokens)

    def report(self, calculus: _Calculus) -> Report:
        """The full pass, and everything put together."""
        settings = self.settings
        dtype = settings.full_dtype(calculus.curves)
        if settings.dtype is None and dtype == torch.float64:
            self.notes.append(
                "measured in float64 throughout: the update is too small for float32"
            )
        with self._staged(self.batches, dtype) as cut:
            selection = self._selection(cut)
            table = Table(selection)
            width = _width(self.model)
            sites = self._steered_sites(selection)
            specs = settings.specs(sites, width)
            moments = MomentTable(cut, sites, settings.target)
            ladder = self._ladder(cut, specs, sites)
            self._full_pass(cut, table, moments, ladder)
            reach = self._radii(cut, table, calculus)
            plain_add = bool(cut.blocks and cut.blocks.architecture.plain_add)
            parameters = sum(p.numel() for p in self.model.parameters())
            return Report(
                subject=self._subject(cut, parameters, width, calculus.tokens),
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
                notes=tuple(self.notes),
            )

    def _steered_sites(self, selection: Selection) -> tuple[str, ...]:
        if self.kind == "random":
            self.notes.append(
                "not measured: random inputs (radius, fits and behaviour need real "
                'ones: pass `inputs=`, for instance texts, or "samples")'
            )
            return ()
        if len(selection.sites) > MODULE_SITES:
            self.notes.append(
                f"fits and behaviour for the first {MODULE_SITES} of "
                f"{len(selection.sites)} sites; choose others with `sites=`"
            )
        return selection.sites[:MODULE_SITES]

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
        self, cut: StagedModel, table: Table, calculus: _Calculus
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
        )
        _step(self.bar, "radii")
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
        passes = propagate(cut, self.update, points, low=self.low, local=points)
        self.bar.total += len(cut.stages)
        for stage, tensors, traces in self._shown(passes):
            kept = []
            for trace in traces:
                table.add(trace, cut.batches[trace.batch].mask)
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
            if stage.name in ("block", "module"):
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
            _step(
                self.bar,
                f"block {stage.layer}" if stage.name == "block" else "full pass",
            )

    def _subject(
        self, cut: StagedModel, parameters: int, width: int | None, few: int
    ) -> Subject:
        settings = self.settings
        return Subject(
            model=f"{type(self.model).__name__}",
            num_parameters=parameters,
            num_layers=cut.num_layers,
            d_model=width,
            update=self.update.source,
            update_norm=self.update.norm(),
            update_relative_norm=self.update.relative_norm(self.model),
            update_names=len(self.update.deltas),
            inputs=self.kind,
            sequences=sum(b.sequences for b in self.batches),
            tokens=sum(b.tokens for b in self.batches),
            held_out_sequences=sum(b.sequences for b in self.batches if b.held_out),
            calculus_tokens=few,
            seed=settings.seed,
            at=settings.at,
            target=settings.target,
            rank=settings.rank,
            max_remainder=settings.max_remainder,
            tolerance=TOLERANCE,
            versions=_versions(),
        )


def _settings(
    sites: Sequence[str] | None,
    forms: Sequence[str],
    rank: int,
    target: str,
    at: str,
    max_remainder: float | None,
    dtype: torch.dtype | None,
    seed: int,
) -> _Settings:
    """Check the arguments; raises `ArgumentError` or `SiteError`."""
    chosen = None if sites is None else as_names("sites", sites, SITES)
    if chosen == ():
        raise SiteError("Expected at least one site, got none.")
    if max_remainder is not None:
        expected = "a number >= 0, or None to ask for the order alone"
        max_remainder = as_number(
            "max_remainder", max_remainder, expected, lambda value: value >= 0
        )
    named = as_names("forms", forms, FORMS)
    return _Settings(
        chosen,
        tuple(as_choice("forms", form, FORMS) for form in named),
        as_integer("rank", rank, 1),
        as_choice("target", target, TARGETS),
        as_choice("at", at, _AT),
        max_remainder,
        None if dtype is None else as_dtype(dtype),
        as_seed(seed),
    )


def _inputs(
    model: nn.Module, update: Update, inputs: object, tokenizer: Any, seed: int
) -> tuple[str, list[Batch]]:
    """What kind of inputs these are, and the batches."""
    if inputs is None:
        return "random", from_inputs(model, random_inputs(model, seed))
    if isinstance(inputs, str) and inputs == "samples":
        return "samples", from_inputs(model, _samples(model, update, seed))
    if isinstance(inputs, Iterator):
        inputs = list(inputs)
    texts = isinstance(inputs, str) or (
        isinstance(inputs, Sequence) and bool(inputs) and isinstance(inputs[0], str)
    )
    return ("texts" if texts else "given"), from_inputs(model, inputs, tokenizer)


def _samples(model: nn.Module, update: Update, seed: int) -> Tensor:
    """Half sampled from the base, half from the tuned model."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None or not hasattr(model, "lm_head"):
        raise InputsError(
            f'"samples" needs a model that generates text, got {type(model).__name__}. '
            "Pass texts or tensors."
        )
    base = {name: p.detach() for name, p in model.named_parameters()}
    moved = {
        name: base[name]
        + (delta.dense() if isinstance(delta, LowRank) else delta).to(base[name].dtype)
        for name, delta in update.deltas.items()
    }

    def logits_of(tensors: dict[str, Tensor]) -> Any:
        def run(ids: Tensor) -> Tensor:
            call = {"input_ids": ids.to(model.device), "use_cache": False}  # pyright: ignore
            return functional_call(model, tensors, (), call).logits

        return run

    return sampled(logits_of(base), logits_of({**base, **moved}), size, seed)


def _width(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return getattr(config, "hidden_size", None)


def _versions() -> tuple[tuple[str, str], ...]:
    names = ("equiv", "torch", "transformers", "peft")
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def _bar(show: bool) -> Any:
    """A progress bar on standard error; the full pass adds a step per stage."""
    from tqdm import tqdm

    layout = "{desc:<28} {bar:30} {n_fmt:>3}/{total_fmt} {elapsed}"
    return tqdm(total=3, disable=not show, bar_format=layout, desc="equiv check")


def _step(bar: Any, done: str) -> None:
    bar.set_description(f"equiv check: {done}", refresh=False)
    bar.update()
