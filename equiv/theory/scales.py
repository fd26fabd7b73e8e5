"""Activations of a model at several scales of an update, layer by layer, in float64."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equiv.model.batches import Batch
from equiv.model.choosing import block_sites
from equiv.model.families import find_blocks
from equiv.model.guard import measured
from equiv.model.stages import StagedModel, staged
from equiv.shift.measures import counted
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import Point, Trace
from equiv.theory.setting import Setting

# site → rows of the tokens that count, [tokens, d]
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scaled:
    """What one layer, or the model's output, does as the update grows.

    Attributes:
        layer: Index of the block; the number of blocks for the output.
        base: h(0) by site.
        shift: t → h(t) − h(0) by site.
        slope: t → h′(t) by site.
        held_out: Tokens of the sequences that are held out, bool [tokens].
    """

    layer: int
    base: Rows
    shift: Mapping[float, Rows]
    slope: Mapping[float, Rows]
    held_out: Tensor


def at_scales(
    setting: Setting,
    batches: Sequence[Batch],
    scales: Sequence[float] = (),
    slopes: Sequence[float] = (),
) -> Iterator[Scaled]:
    """Every layer that the update moves, and the output, from bottom to top.

    Args:
        setting: Model and update.
        batches: What it is run on.
        scales: The t at which shifts are wanted.
        slopes: The t at which derivatives are wanted.
    """
    model, update = setting.model, setting.update
    blocks = find_blocks(model)
    sites = block_sites(blocks, ["*"]) if blocks else None
    low = low_rank_names(model, update)
    points = [Point(t, t in slopes) for t in sorted({*scales, *slopes, 0.0})]
    with (
        measured(model),
        staged(model, batches, torch.float64, sites=sites, low_names=low) as cut,
    ):
        for stage, _, found in propagate(cut, update, points, low=low):
            traces = list(found)
            if stage.name in ("embed", "bridge") or not all(t.moved for t in traces):
                continue
            names = stage.sites or (stage.output,)
            yield _gathered(cut, traces, names, scales, slopes)


def _gathered(
    cut: StagedModel,
    traces: Sequence[Trace],
    names: Sequence[str],
    scales: Sequence[float],
    slopes: Sequence[float],
) -> Scaled:
    masks = [cut.mask(t.stage, t.batch) for t in traces]

    def rows(parts: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
        pairs = zip(parts, masks, strict=True)
        return torch.cat([counted(part[name], mask) for part, mask in pairs])

    def at(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: rows(parts, name) for name in names}

    base = at([t.values[0.0] for t in traces])
    moved = {s: at([t.values[s] for t in traces]) for s in scales}
    held = [
        torch.full((len(counted(t.values[0.0][names[0]], mask)),), out)
        for t, mask, out in zip(
            traces, masks, [cut.batches[t.batch].held_out for t in traces], strict=True
        )
    ]
    return Scaled(
        traces[0].stage.layer,
        base,
        {s: {n: x - base[n] for n, x in found.items()} for s, found in moved.items()},
        {s: at([t.tangents[s] for t in traces]) for s in slopes},
        torch.cat(held),
    )
