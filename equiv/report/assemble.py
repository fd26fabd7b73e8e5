"""From measurements to report rows: pure functions, nothing is computed on a model."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from equiv.behaviour.distance import Distances, interval, recovered
from equiv.behaviour.ladder import Label, Ladder
from equiv.model.sites import Site
from equiv.report.values import (
    Behaviour,
    Coverage,
    FirstPosition,
    FitRow,
    Order,
    Radius,
    Rest,
    Routing,
    Row,
    Scope,
    Unflipped,
)
from equiv.shift.calculus import Curve, RowKey
from equiv.shift.flips import Flips
from equiv.shift.radius import Part, Question
from equiv.shift.table import CoverageSums, FullSize, StreamSums
from equiv.steering.fits.chain import Spec
from equiv.steering.fits.moments import ENOUGH_TOKENS, Regression
from equiv.steering.fits.sinks import SINK
from equiv.steering.fits.table import MomentTable, PairKey

BEST_SINGLE_LAYERS = 3
_SCOPES = (Scope.PROPAGATED, Scope.LOCAL)


def rows(
    full: Mapping[RowKey, FullSize],
    curves: Mapping[RowKey, Curve],
    radii: Mapping[Question, Radius],
    *,
    midpoint: bool,
    dtype: torch.dtype,
    order_dtype: torch.dtype,
) -> tuple[Row, ...]:
    """One row per (layer, site, scope), in the order of the model."""
    made = []
    for key, sums in full.items():
        curve = curves[key]
        made.append(
            Row(
                layer=key[0],
                site=key[1],
                scope=key[2],
                tokens=sums.tokens,
                dtype=_name(dtype),
                derivative=sums.derivative,
                norm_base=sums.base.norm,
                norm_exact=sums.first.exact**0.5,
                norm_first_order=sums.first.claimed**0.5,
                remainder=sums.first.relative_remainder,
                remainder_midpoint=sums.midpoint.relative_remainder
                if midpoint
                else None,
                cosine=sums.first.cosine,
                cosine_midpoint=sums.midpoint.cosine if midpoint else None,
                order=curve.order(order_dtype),
                order_midpoint=_midpoint_order(curve, order_dtype, midpoint),
                radius=radii.get((key, False, Part.ALL)),
                radius_midpoint=radii.get((key, True, Part.ALL)),
                taylor=curve.points(),
                taylor_floor=curve.floor(order_dtype),
                taylor_dtype=_name(order_dtype),
                rest=_rest(sums.rest, key, radii, midpoint),
                unflipped=_unflipped(
                    sums.unflipped, curve.unflipped, key, radii, midpoint, order_dtype
                ),
            )
        )
    return tuple(sorted(made, key=lambda row: (row.layer, _SCOPES.index(row.scope))))


def _rest(
    sums: FullSize | None,
    key: RowKey,
    radii: Mapping[Question, Radius],
    midpoint: bool,
) -> Rest | None:
    if sums is None or not sums.tokens:
        return None
    return Rest(
        tokens=sums.tokens,
        norm_base=sums.base.norm,
        norm_exact=sums.first.exact**0.5,
        remainder=sums.first.relative_remainder,
        remainder_midpoint=sums.midpoint.relative_remainder if midpoint else None,
        radius=radii.get((key, False, Part.REST)),
        radius_midpoint=radii.get((key, True, Part.REST)),
    )


def _unflipped(
    sums: FullSize | None,
    curve: Curve | None,
    key: RowKey,
    radii: Mapping[Question, Radius],
    midpoint: bool,
    dtype: torch.dtype,
) -> Unflipped | None:
    if sums is None or not sums.tokens:
        return None
    judged = curve if curve is not None and curve.tokens else None
    return Unflipped(
        tokens=sums.tokens,
        norm_base=sums.base.norm,
        norm_exact=sums.first.exact**0.5,
        remainder=sums.first.relative_remainder,
        remainder_midpoint=sums.midpoint.relative_remainder if midpoint else None,
        order=judged and judged.order(dtype),
        order_midpoint=judged and _midpoint_order(judged, dtype, midpoint),
        radius=radii.get((key, False, Part.UNFLIPPED)),
        radius_midpoint=radii.get((key, True, Part.UNFLIPPED)),
    )


def routing(flips: Flips) -> tuple[Routing, ...]:
    """The share of tokens that change experts, per mixture."""
    return tuple(
        Routing(layer, n.tokens, n.here / n.tokens, n.so_far / n.tokens)
        for layer, n in flips.counts.items()
        if n.tokens
    )


def first_positions(sums: Mapping[int, StreamSums]) -> tuple[FirstPosition, ...]:
    """The stream at first positions beside the others', per layer that has both."""
    made = []
    for layer, entry in sums.items():
        if entry.firsts and entry.others:
            first, rest = entry.first / entry.firsts, entry.rest / entry.others
            made.append(FirstPosition(layer, first, rest, first > SINK * rest))
    return tuple(made)


def _midpoint_order(curve: Curve, dtype: torch.dtype, midpoint: bool) -> Order | None:
    return curve.order(dtype, midpoint=True) if midpoint else None


def coverage(
    sums: Mapping[tuple[int, Scope], CoverageSums], plain_add: bool
) -> tuple[Coverage, ...]:
    """The four ratios per layer and scope."""
    return tuple(
        Coverage(layer, scope, *entry.ratios(plain_add))
        for (layer, scope), entry in sums.items()
    )


def fits(table: MomentTable, specs: Sequence[Spec]) -> tuple[FitRow, ...]:
    """Misfit of every form at every layer and site that has a shift."""
    made: list[FitRow] = []
    for layer, site, aimed in table.fitting:
        asked = [spec for spec in specs if spec.site == site]
        if aimed != table.fit_target(site) or not asked:
            continue
        # One at a time: its matrices are as wide as the model.
        regression = Regression(table.fitting[layer, site, aimed], asked[0].fixed_ridge)
        made += (_fit(table, (layer, site, aimed), spec, regression) for spec in asked)
    return tuple(made)


def _fit(
    table: MomentTable, key: PairKey, spec: Spec, regression: Regression
) -> FitRow:
    moments, held = table.fitting[key], table.held_out.get(key)
    steering = regression.form(str(spec.form), spec.rank)
    density = moments.n / moments.width
    verdict, reason = _fit_verdict(density, held is not None)
    layer, site, aimed = key
    return FitRow(
        layer=layer,
        reads=Site(site).read,
        writes=Site(site).write,
        form=spec.rung,
        rank=_rank(spec, moments.width),
        target=_aimed_at(table, site, aimed),
        num_parameters=steering.num_parameters,
        ridge=spec.fixed_ridge,
        misfit=moments.misfit(steering),
        misfit_held_out=None if held is None else held.misfit(steering),
        tokens_per_dimension=density,
        verdict=verdict,
        reason=reason,
    )


def _aimed_at(table: MomentTable, site: str, aimed: str) -> str:
    """Whose shift, in a word; at `block_out` the two are one, and it is as asked."""
    if aimed != Site(site).write:
        return "block"
    return table.target if aimed == "block_out" else "shift"


def _rank(spec: Spec, width: int) -> int | None:
    if spec.form == "vector":
        return None
    return width if spec.rank is None else min(spec.rank, width)


def _fit_verdict(density: float, held_out: bool) -> tuple[str, str]:
    if not held_out:
        return "inconclusive", "fewer than two sequences: none can be held out"
    if density < ENOUGH_TOKENS:
        return (
            "too few tokens",
            f"{density:.1f} tokens per dimension, expected at least "
            f"{ENOUGH_TOKENS:.0f}: fits of full rank may not generalise",
        )
    return "measured", ""


def behaviour(
    ladder: Ladder, specs: Sequence[Spec], *, model_parameters: int, seed: int
) -> tuple[Behaviour, ...]:
    """The ladder's rows: unsteered, fitted rungs, oracles, best single layers."""
    none = ladder.unsteered
    if none is None:
        return ()
    made = [_row(ladder, Label("", "unsteered"), none, none, model_parameters, seed)]
    best = _best_strengths(ladder, none)
    order = {(s.site, s.rung): i for i, s in enumerate(specs)}
    everywhere = [label for label in best if label.layers == "all"]
    everywhere.sort(key=lambda label: order.get((label.site, label.rung), len(order)))
    alone = [label for label in best if label.layers != "all"]
    alone.sort(key=lambda label: -(recovered(best[label], none) or 0.0))
    for label in (*everywhere, *alone[:BEST_SINGLE_LAYERS]):
        made.append(_row(ladder, label, best[label], none, model_parameters, seed))
    return tuple(made)


def _best_strengths(ladder: Ladder, none: Distances) -> dict[Label, Distances]:
    """Of each rung, the strength that leaves the smallest distance; 0 is allowed."""
    best: dict[tuple[str, str, str], tuple[Label, Distances]] = {}
    for label, found in ladder.distances.items():
        key = (label.site, label.rung, label.layers)
        if label.strength is not None and key not in best:
            best[key] = (Label(*key, 0.0), none)
        if key not in best or found.mean < best[key][1].mean:
            best[key] = (label, found)
    return dict(best.values())


def _row(
    ladder: Ladder,
    label: Label,
    found: Distances,
    none: Distances,
    model_parameters: int,
    seed: int,
) -> Behaviour:
    share = recovered(found, none)
    low, high = (None, None) if found is none else interval(found, none, seed)
    key = Label(label.site, label.rung, label.layers, 1.0)
    count = ladder.num_parameters.get(key)
    values = found.tokens_flat
    kl = found.has_logits
    fitted = label.strength is not None
    return Behaviour(
        reads=Site(label.site).read if fitted else "",
        writes=Site(label.site).write,
        rung=label.rung,
        layers=label.layers,
        target=ladder.targets.get(key, ""),
        measure="kl" if kl else "output",
        distance=found.mean,
        recovered=share,
        recovered_low=low,
        recovered_high=high,
        distance_p999=float(np.quantile(values, 0.999)) if kl else None,
        distance_max=float(values.max()) if kl else None,
        same_top=found.same_top / found.tokens if kl and found.tokens else None,
        loss=found.loss / found.labelled if found.labelled else None,
        loss_tuned=found.loss_tuned / found.labelled if found.labelled else None,
        output_difference=None if kl else found.mean**0.5,
        output_cosine=None if kl else found.cosine,
        strength=label.strength,
        num_parameters=count,
        parameter_share=None if count is None else count / model_parameters,
        sequences=found.sequences,
        reason=_strength_reason(label),
    )


def _strength_reason(label: Label) -> str:
    if label.strength == 0:
        return "worse than no steering at every strength tried"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
