"""`equiv.shifts`: the shifts themselves, as tensors, per layer and site."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

import torch
from torch import Tensor, nn

from equiv.arguments import as_choice, as_dtype, as_layers, as_names, shown
from equiv.errors import SiteError
from equiv.model.batches import Batch
from equiv.model.choosing import block_sites, module_sites
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import FLOW, SITES, SiteKey, as_site_key
from equiv.model.stages import Stage, StagedModel, prepared
from equiv.shift.derivative import CENTRAL, CHOICES, JVP
from equiv.shift.propagate import propagate
from equiv.shift.silent import check_derivative
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import BASE, MIDPOINT, TUNED, Trace
from equiv.update.several import OneUpdate, resolve_by_name
from equiv.update.update import Update


@dataclass(frozen=True)
class Shift:
    """What an update does to one activation.

    All tensors are [batch, seq, d] ([batch, d] for a plain module), in the compute
    dtype. Sequences stand in the caller's order; where batches differ in length the
    shorter are padded on the right, with the mask false.

    Attributes:
        layer: Index of the block.
        site: Name of the site.
        base: The activation h of the base model.
        exact: Propagated shift, h(W + ΔW) − h(W).
        first_order: Its derivative at the base, in direction ΔW.
        midpoint: Its derivative at W + ΔW/2.
        local_exact: Shift of this block's update alone, its input held at the base.
        local_first_order: Its derivative at the base.
        mask: Tokens that count, bool [batch, seq].
        derivative: How the derivatives were had: "jvp", "double backward" (the same
            by two reverse passes, where an operation has no forward rule) or
            "central" (differences, asked for).
    """

    layer: int
    site: str
    base: Tensor
    exact: Tensor
    first_order: Tensor
    midpoint: Tensor
    local_exact: Tensor
    local_first_order: Tensor
    mask: Tensor
    derivative: str = JVP


class Shifts:
    """Shifts of one model, update and inputs, computed when asked for.

    `shifts[layer, site]` runs the model up to that layer and keeps nothing but the
    answer; iterating runs it once and hands out one layer after the other, so memory
    holds one block's activations at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        update: Update,
        batches: list[Batch],
        dtype: torch.dtype,
        sites: tuple[str, ...] | None,
        layers: tuple[int, ...],
        derivative: str = "forward",
    ) -> None:
        self._derivative, self._checked = derivative, derivative == CENTRAL
        self._model, self._update, self._batches = model, update, batches
        self._dtype, self._sites, self._layers = dtype, sites, layers

    def __getitem__(self, key: SiteKey) -> Shift:
        """The shift at (layer, site).

        Raises:
            SiteError: If the key was not selected or does not exist.
        """
        layer, site = as_site_key(key)
        if layer not in self._layers or (self._sites and site not in self._sites):
            raise SiteError(
                f"Expected a layer in {list(self._layers)} and a site in "
                f"{list(self._sites or ())}, got {key!r}."
            )
        for shift in self._stream(layer):
            if (shift.layer, shift.site) == (layer, site):
                return shift
        raise SiteError(f"The model has no site {site!r} in layer {layer}.")

    def __repr__(self) -> str:
        sites = ", ".join(self._sites or ("all",))
        sequences = sum(batch.sequences for batch in self._batches)
        return (
            f"Shifts({type(self._model).__name__}, {self._update.source}: "
            f"layers {shown(list(self._layers))}, sites {sites}, {sequences} sequences)"
        )

    def __iter__(self) -> Iterator[Shift]:
        """Every selected shift, from the first layer to the last."""
        yield from self._stream(None)

    def _check(self, low: Sequence[str]) -> None:
        """Once: that the derivative is that of what the model computes."""
        if not self._checked:
            check_derivative(self._model, self._update, self._batches, self._dtype, low)
            self._checked = True

    def _stream(self, only: int | None) -> Iterator[Shift]:
        model, low = self._model, low_rank_names(self._model, self._update)
        with measured(model):
            self._check(low)
            cut = prepared(model, self._batches, self._dtype, self._sites)
        points = (BASE, MIDPOINT, TUNED)
        passes = propagate(
            cut,
            self._update,
            points,
            low=low,
            local=(BASE, TUNED),
            derivative=self._derivative,
        )
        for _ in cut.stages:
            # The model is put back before each shift is handed out: what the caller
            # does between two shifts, with this model too, is not ours.
            with measured(model), cut.ready(low):
                stage, _, traces = next(passes)
                kept = list(traces)
            inside = stage.name in ("block", "module")
            wanted = only is None or stage.layer == only
            if wanted and inside and stage.layer in self._layers:
                for site in self._sites or stage.sites:
                    if site in stage.sites or "->" in site:
                        yield _gather(cut, stage, site, kept)
            if only is not None and inside and stage.layer >= only:
                return


@overload
def shifts(
    model: nn.Module,
    delta_w: OneUpdate,
    inputs: object,
    *,
    sites: Sequence[str] | None = ...,
    layers: Iterable[SupportsIndex] | None = ...,
    tokenizer: Any = ...,
    dtype: torch.dtype = ...,
    derivative: str = ...,
) -> Shifts: ...


@overload
def shifts(
    model: nn.Module,
    delta_w: Mapping[str, OneUpdate],
    inputs: object,
    *,
    sites: Sequence[str] | None = ...,
    layers: Iterable[SupportsIndex] | None = ...,
    tokenizer: Any = ...,
    dtype: torch.dtype = ...,
    derivative: str = ...,
) -> dict[str, Shifts]: ...


def shifts(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    sites: Sequence[str] | None = SITES,
    layers: Iterable[SupportsIndex] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    derivative: str = "forward",
) -> Shifts | dict[str, Shifts]:
    """The shifts that an update induces, as tensors.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes; also several by name.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`.
        sites: Sites wanted, by name or pattern; `None` for all.
        layers: Layers wanted; `None` for all.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype, torch.float32 or torch.float64.
        derivative: "forward" (exact), or "central" for differences, as in
            `equiv.check`.

    Returns:
        A mapping from (layer, site), computed when asked for; of several updates one
        by name for each.

    Raises:
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
        >>> x = torch.ones(1, 2)
        >>> s = shifts(model, {"0.weight": torch.eye(2)}, x, sites=("0",))[0, "0"]
        >>> torch.allclose(s.exact, x)  # (W + I) x − W x
        True
        >>> torch.equal(s.first_order, x)  # the model is linear in W
        True
    """
    check_model(model)
    dtype, derivative = as_dtype(dtype), as_choice("derivative", derivative, CHOICES)
    chosen = None if sites is None else as_names("sites", sites, SITES)
    updates, several = resolve_by_name(model, delta_w)
    blocks = find_blocks(model)
    if chosen in (None, SITES):
        chosen = blocks.sites if blocks else None
    if chosen == ():
        raise SiteError("Expected at least one site, got none.")
    count = len(blocks.modules) if blocks else 1
    picked = as_layers(layers, count) or tuple(range(count))
    if blocks is not None and chosen:
        chosen = block_sites(blocks, chosen)
        if unknown := [site for site in chosen if site not in FLOW]:
            raise SiteError(f"Expected sites in {', '.join(FLOW)}, got {unknown}.")
    batches = from_inputs(model, inputs, tokenizer, keep_empty=True)
    if blocks is None and chosen:
        with measured(model):
            chosen = module_sites(model, batches, dtype, chosen)
    found = {
        name: Shifts(model, update, batches, dtype, chosen, picked, derivative)
        for name, update in updates.items()
    }
    return found if several else found[""]


def _gather(
    cut: StagedModel, stage: Stage, site: str, traces: Sequence[Trace]
) -> Shift:
    parts: dict[str, list[Tensor]] = {}
    for trace in traces:
        base = trace.values[0.0][site]
        zero = torch.zeros_like(base)
        tangents, local = trace.tangents, trace.local_values
        values = {
            "base": base,
            "exact": trace.values[1.0][site] - base,
            "first_order": tangents[0.0][site] if tangents else zero,
            "midpoint": tangents[0.5][site] if tangents else zero,
            "local_exact": local[1.0][site] - local[0.0][site] if local else zero,
            "local_first_order": trace.local_tangents[0.0][site] if local else zero,
            "mask": cut.mask(stage, trace.batch),
        }
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    index = torch.tensor([n for t in traces for n in cut.batches[t.batch].index])
    order = index.argsort()
    joined = {name: _joined(part)[order] for name, part in parts.items()}
    return Shift(stage.layer, site, **joined, derivative=traces[0].derivative)


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches one below the other, padded on the right to the longest sequence."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    rows = [row for part in parts for row in part]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
