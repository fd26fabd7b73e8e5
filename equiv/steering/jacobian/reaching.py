"""`equiv.reach`: which shifts of a later site can a steer bring about at all?"""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from equiv.arguments import (
    as_dtype,
    as_integer,
    as_number,
    as_rank,
    as_ridge,
    as_seed,
)
from equiv.errors import InputsError
from equiv.model.batches import split
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import Site, as_site_key
from equiv.model.stages import StagedModel, staged
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import TUNED, Point
from equiv.steering.fits.moments import RIDGE
from equiv.steering.jacobian.downstream import ITERATIONS
from equiv.steering.jacobian.later import Later, as_later, check_later
from equiv.steering.jacobian.linearised import norm
from equiv.steering.jacobian.passage import Passage, part_of, way
from equiv.steering.jacobian.unknowns import Question, Reach
from equiv.update.sources import resolve
from equiv.update.update import Update

SIZES = (0.05, 0.1, 0.25, 0.5, 1.0)
HELD_OUT = 0.25


def reach(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    layer: SupportsIndex,
    site: str | Site = "mlp_in",
    at: str | tuple[SupportsIndex, str] = "mlp_out",
    rank: int | None = 8,
    sizes: Sequence[float] = SIZES,
    tolerance: float = 0.1,
    tokenizer: Any = None,
    ridge: float = RIDGE,
    first_position: bool | None = None,
    iterations: int = ITERATIONS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Reach, ...]:
    """Which shift at one site brings about an update's shift at a later one.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; a
            quarter of the sequences is held out.
        layer: The steer's layer.
        site: Where the steer reads and writes.
        at: The later site: a name for one in the same layer, (layer, name), or
            "logits" or "output" for what the model returns.
        rank: Of the second affine map; `None` leaves it out.
        sizes: The t of the curve.
        tolerance: Relative error within which a target counts as reached there.
        tokenizer: Tokenizer for texts.
        ridge: Relative ridge of the affine maps.
        first_position: Whether the shift at the first token of each sequence counts;
            `None`: unless it is a sink (see `equiv.steering.fits.sinks`).
        iterations: Of the solver, at most so many each time it is called.
        dtype: Compute dtype, torch.float32 or torch.float64.
        seed: Draws the sequences that are held out.

    Returns:
        A value each for "token", "vector", "affine full" and "affine r<rank>".

    Raises:
        SiteError: If `at` does not come after `site`.
        InputsError: If the update does not move `at` on these inputs.
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Tanh(), nn.Linear(3, 3))
        >>> model[1].weight.data = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> update = {"1.weight": 0.1 * torch.eye(3)}
        >>> token, vector, full = reach(model, update, torch.randn(40, 3), layer=0,
        ...     site="0", at="1", rank=None, ridge=0.0)
        >>> token.residual < 1e-4, full.residual < 1e-4, vector.residual > 0.1
        (True, True, True)
        >>> round(token.condition, 3)
        4.0
    """
    check_model(model)
    dtype, rank, ridge = as_dtype(dtype), as_rank(rank), as_ridge(ridge)
    iterations = as_integer("iterations", iterations, 1)
    share = as_number("tolerance", tolerance, "a number in (0, 1)", lambda x: 0 < x < 1)
    chosen, key = as_site_key((layer, site))
    lengths = [as_number("sizes", size) for size in sizes]
    later = as_later(at)
    update = resolve(model, delta_w)
    batches = split(from_inputs(model, inputs, tokenizer), HELD_OUT, as_seed(seed))
    low = low_rank_names(model, update)
    sites = (key, *later.captured)
    with (
        measured(model),
        staged(model, batches, dtype, sites=sites, low_names=low) as cut,
    ):
        check_later(cut, chosen, key, later)
        question = _question(cut, update, low, chosen, key, later, first_position)
        found = [question.token(iterations, share, lengths)]
        forms: list[tuple[str, int | None]] = [("vector", None), ("affine", None)]
        if rank is not None:
            forms.append(("affine", rank))
        found += [question.shared(form, own, ridge, iterations) for form, own in forms]
    return tuple(found)


def _question(
    cut: StagedModel,
    update: Update,
    low: list[str],
    layer: int,
    site: str,
    later: Later,
    first_position: bool | None,
) -> Question:
    """The target and the way to it, for the fitted and the held-out sequences."""
    hidden, tuned = _streams(cut, update, low, layer, later)
    road = way(cut, layer, site, later)
    sides: dict[bool, Passage] = {}
    for out in (False, True):
        parts = tuple(
            part_of(road, i, hidden.get(i), first_position=first_position)
            for i, batch in enumerate(cut.batches)
            if batch.held_out == out
        )
        if parts:
            sides[out] = Passage(road, parts)
    targets = {out: passage.missing(tuned) for out, passage in sides.items()}
    if not norm(targets[False]):
        raise InputsError(
            f"The update does not move {later.key} on these inputs, so there is no "
            "shift to reach."
        )
    return Question(layer, later.key, sides, targets)


def _streams(
    cut: StagedModel, update: Update, low: list[str], layer: int, later: Later
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By batch: the base stream at the layer's input, the later site's tuned value."""
    end, name = later.place(cut, layer)
    hidden: dict[int, Tensor] = {}
    points = (Point(0.0), TUNED)
    below = [stage.layer for stage in cut.stages].index(layer) - 1
    passes = propagate(cut, update, points, low=low)
    for number, (stage, _, traces) in enumerate(passes):
        if stage.layer == end:
            return hidden, {t.batch: t.values[1.0][name] for t in traces}
        for trace in traces:
            if number == below:
                hidden[trace.batch] = trace.values[0.0][stage.output]
    raise AssertionError("a stage that ends the way")
