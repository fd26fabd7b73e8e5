"""`equiv.fit_sequential`: steering per layer, each fitted on the steered stream.

All at once is the other order (`order="simultaneous"`): every layer is fitted on the
unsteered stream. Then what it has to make is its own block's shift (`scope="local"`):
to first order these add up to the update. The whole shift that is seen there
(`scope="propagated"`) is offered because people fit that; what the layers below make
arrives a second time through the stream.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from equiv.arguments import (
    as_choice,
    as_dtype,
    as_layers,
    as_rank,
    as_ridge,
    as_seed,
    shown,
)
from equiv.errors import ArgumentError
from equiv.model.batches import Batch, split
from equiv.model.families import find_blocks
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import FLOW, Site, SiteKey
from equiv.model.stages import StagedModel, staged
from equiv.shift.measures import counted
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import TUNED, Point, Trace
from equiv.steering.fits.chain import TARGETS, Chain, Plan, Spec, aim
from equiv.steering.fits.fitter import Fitted, as_form
from equiv.steering.fits.fitting import CHOOSING
from equiv.steering.fits.plan import Planned
from equiv.steering.fits.sinks import fitted_tokens, stream_of
from equiv.steering.forms.custom import Custom
from equiv.steering.forms.form import Steering
from equiv.steering.forms.mlp import ACTIVATIONS
from equiv.steering.forms.steering_set import SteeringSet
from equiv.update.sources import resolve
from equiv.update.update import Update

ORDERS = ("sequential", "simultaneous")
SCOPES = ("local", "propagated")


def fit_sequential(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    site: str | Site = "block_out",
    form: str | nn.Module | Custom = "affine",
    rank: int | None = 8,
    target: str = "block",
    plan: Iterable[Planned] | None = None,
    order: str = "sequential",
    scope: str = "local",
    layers: Iterable[SupportsIndex] | None = None,
    tokenizer: Any = None,
    ridge: float | None = None,
    activation: str = "silu",
    first_position: bool | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SteeringSet:
    """Fit steering at one site of every layer, from the first layer to the last.

    Block l is fitted on the stream that is already steered below it, so that it makes
    up for what is still missing there and nothing is counted twice. Layers below the
    first that the update touches get no steering.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; all of
            them are fitted on.
        site: Where the steering reads and writes.
        form: "vector", "linear", "affine", "loreft", "mlp" or "heads" (at attn_heads);
            or a module h → shift, of which a copy is fitted for every layer.
        rank: Rank of the map; `None` for full rank.
        target: "block" or "shift"; see `equiv.check`.
        plan: What to fit where, instead of one site, form and rank in all `layers`;
            several steers of a layer are fitted in the order of the block.
        order: "sequential", or "simultaneous": every layer on the unsteered stream.
        scope: The shift that simultaneous fits make: the block's own, "local", or the
            whole one, "propagated", which counts the layers below again.
        layers: Layers that get steering; `None` for all that have the site.
        tokenizer: Tokenizer for texts.
        ridge: Relative ridge of the fits; `None` to choose it, per steer, on a quarter
            of the sequences, before all are fitted.
        activation: Of a low-rank MLP.
        first_position: Whether the first token of each sequence is fitted; `None`:
            unless it is a sink (see `equiv.steering.fits.sinks`).
        dtype: Compute dtype of the activations, torch.float32 or torch.float64; the
            fits are solved in float64.
        seed: Draws the quarter that chooses the ridge.

    Returns:
        (layer, site) → steering, ready for `equiv.steer`. `about["fits"]` has the ridge
        of each and whether an iterative fit converged.

    Raises:
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity())
        >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> fitted = fit_sequential(model, {"0.weight": torch.eye(2)}, x, site="0",
        ...                         form="vector")
        >>> torch.allclose(fitted[0, "0"](x)[0], x.mean(0), atol=1e-6)
        True
    """
    check_model(model)
    spec = Spec(
        site.key if isinstance(site, Site) else Site(site).key,
        as_form(form),
        as_rank(rank),
        as_choice("target", target, TARGETS),
        None if ridge is None else as_ridge(ridge),
        first_position,
        as_choice("activation", activation, tuple(ACTIVATIONS)),
    )
    simultaneous = as_choice("order", order, ORDERS) == "simultaneous"
    scope, dtype, seed = (
        as_choice("scope", scope, SCOPES),
        as_dtype(dtype),
        as_seed(seed),
    )
    blocks = find_blocks(model)
    count = len(blocks.modules) if blocks else 1
    everywhere = range(count) if blocks is None else blocks.layers_with(spec.site)
    chosen = as_layers(layers, count) or tuple(everywhere)
    asked = dict.fromkeys(chosen, (spec,)) if plan is None else as_plan(plan, spec)
    as_layers(asked, count)
    update = resolve(model, delta_w)
    batches, choosing = _apart(from_inputs(model, inputs, tokenizer), asked, seed)
    low = low_rank_names(model, update)
    sites = tuple(dict.fromkeys(s.site for specs in asked.values() for s in specs))
    with (
        measured(model),
        staged(model, batches, dtype, sites=sites, low_names=low) as cut,
    ):
        for layer, specs in asked.items() if blocks else ():
            for own in specs:
                cut.check_site(layer, own.site)
        if simultaneous:
            fits = _at_once(cut, update, asked, low, choosing, scope)
        else:
            fits = _upwards(cut, update, asked, low, choosing)
    about = {
        "target": spec.target,
        "order": f"simultaneous, {scope}" if simultaneous else order,
        "fits": {f"{layer}/{site}": _note(fit) for (layer, site), fit in fits.items()},
    }
    steering: dict[SiteKey, Steering] = {key: fit.steering for key, fit in fits.items()}
    return SteeringSet(steering, about=about)


def as_plan(plan: Iterable[Planned], like: Spec) -> Plan:
    """Layer → steers in the order of the block.

    Args:
        plan: What to fit where.
        like: What the plan does not say: target, ridge and so on.

    Raises:
        ArgumentError: If it holds something else, or two steers that write one site.
    """
    made: dict[int, list[Spec]] = {}
    for entry in plan:
        if not isinstance(entry, Planned):
            raise ArgumentError(
                f"Expected `plan` to hold `Planned` entries, got {shown(entry)}."
            )
        spec = replace(
            like,
            site=Site(entry.site).key,
            form=as_form(entry.form),
            rank=as_rank(entry.rank),
        )
        made.setdefault(entry.layer, []).append(spec)
    for layer, specs in made.items():
        writes = [Site(spec.site).write for spec in specs]
        if twice := [w for w in writes if writes.count(w) > 1]:
            raise ArgumentError(
                f"Expected one steer for each site that is written, got {len(twice)} "
                f"for {twice[0]} of layer {layer}."
            )
        specs.sort(key=lambda spec: _when(Site(spec.site).write))
    if not made:
        raise ArgumentError("Expected a plan with at least one entry, got none.")
    return made


def _when(write: str) -> int:
    return FLOW.index(write) if write in FLOW else len(FLOW)


def _apart(
    batches: list[Batch], plan: Plan, seed: int
) -> tuple[list[Batch], frozenset[int]]:
    """Batches, and which of them choose the ridge where it is not given."""
    if all(spec.ridge is not None for specs in plan.values() for spec in specs):
        return batches, frozenset()
    parts = split(batches, CHOOSING, seed)
    choosing = frozenset(i for i, batch in enumerate(parts) if batch.held_out)
    return [replace(batch, held_out=False) for batch in parts], choosing


def _note(fit: Fitted) -> dict[str, object]:
    """How a fit went, as JSON could hold it."""
    found: dict[str, object] = {} if fit.ridge is None else {"ridge": fit.ridge}
    if not fit.converged:
        found |= {"converged": False, "reason": fit.reason}
    return found


def _upwards(
    cut: StagedModel,
    update: Update,
    plan: Plan,
    low: Sequence[str],
    choosing: frozenset[int],
) -> dict[SiteKey, Fitted]:
    chain = Chain(cut, plan, choosing=choosing)
    points = (Point(0.0), TUNED)
    for stage, tensors, traces in propagate(cut, update, points, low=low):
        if stage.name == "embed":
            for trace in traces:
                chain.enter(trace.batch, trace.values[0.0][stage.output])
        elif stage.layer > max(plan):
            break
        else:
            chain.step(stage, tensors, list(traces))
    return chain.fits


def _at_once(
    cut: StagedModel,
    update: Update,
    plan: Plan,
    low: Sequence[str],
    choosing: frozenset[int],
    scope: str,
) -> dict[SiteKey, Fitted]:
    fits: dict[SiteKey, Fitted] = {}
    points = (Point(0.0), TUNED)
    local = points if scope == "local" else ()
    for stage, _, traces in propagate(cut, update, points, low=low, local=local):
        if stage.name == "head":
            break
        kept = list(traces)
        inside = stage.name in ("block", "module")
        for spec in plan.get(stage.layer, ()) if inside else ():
            fitter = spec.fitter(cut, stage.layer)
            for trace in kept:
                if pair := _pair(cut, spec, trace, scope):
                    fitter.add(*pair, choosing=trace.batch in choosing)
            if fitter.fitting.n or fitter.choosing.n:
                fits[stage.layer, spec.site] = fitter.fit()
    return fits


def _pair(
    cut: StagedModel, spec: Spec, trace: Trace, scope: str
) -> tuple[Tensor, Tensor] | None:
    """(what is read, the shift to make) of one batch; `None` where nothing moves."""
    values = trace.local_values if scope == "local" else trace.values
    if not (trace.touched if scope == "local" else trace.moved):
        return None
    aimed, read = aim(cut, spec.site, spec.target), Site(spec.site).read
    base: Mapping[str, Tensor] = trace.values[0.0]
    keep = fitted_tokens(
        cut.mask(trace.stage, trace.batch),
        stream_of(dict(base), read),
        first_position=spec.first_position,
    )
    shift = values[1.0][aimed] - values[0.0][aimed]
    return counted(base[read], keep), counted(shift, keep)
