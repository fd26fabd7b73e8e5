"""`equiv.fit_downstream`: steering that brings about a shift at a later site.

Symbols
    h̃       the stream at a block's input, already steered below
    y       what the later site lacks on it: the tuned activation minus its own
    J       the derivative of the later site by what is added at the write site, at h̃
    Δ(x)    the steering, of what it reads

Per layer Δ is the vector or affine map with the least Σ ‖J Δ(x) − y‖² (see `shared`),
refined where first order is not enough (see `linearised`), and at the strength that
really leaves least, none at all if need be. The next layer starts from the stream that
comes of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from equiv.arguments import (
    as_choice,
    as_dtype,
    as_integer,
    as_layers,
    as_rank,
    as_ridge,
)
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import Site, SiteKey, Steer, as_site_key
from equiv.model.stages import Stage, StagedModel, staged
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import TUNED, Point
from equiv.steering.fits.moments import RIDGE
from equiv.steering.forms.form import Steering
from equiv.steering.forms.steering_set import SteeringSet
from equiv.steering.jacobian.features import SHARED
from equiv.steering.jacobian.later import Later, as_later, check_later, is_later
from equiv.steering.jacobian.linearised import fit_passage, fit_rounds, norm
from equiv.steering.jacobian.passage import Passage, part_of, way
from equiv.steering.jacobian.shared import Solved
from equiv.update.sources import resolve
from equiv.update.update import Update

ITERATIONS, ROUNDS = 200, 3


def with_tuned(
    cut: StagedModel, update: Update, low: list[str], later: Later
) -> Iterator[tuple[Stage, Mapping[str, Tensor], Mapping[int, Tensor]]]:
    """Stream (stage, its tensors, batch → tuned activation at the later site).

    Where the later site lies in the steer's own layer it is that stage's, and streamed;
    a fixed one is made before the first stage and held for all of them.
    """
    points = (Point(0.0), TUNED)
    if not later.is_fixed:
        for stage, tensors, traces in propagate(cut, update, points, low=low):
            inside = stage.name in ("block", "module")
            yield (
                stage,
                tensors,
                {t.batch: t.values[1.0][later.site] for t in traces if inside},
            )
        return
    end, name = later.place(cut, 0)
    tuned: dict[int, Tensor] = {}
    for stage, _, traces in propagate(cut, update, points, low=low):
        tuned = {t.batch: t.values[1.0][name] for t in traces if stage.layer == end}
        if stage.layer == end and stage.name != "embed":
            break
    for stage in cut.stages:
        yield stage, cut.tensors(stage), tuned


def fit_downstream(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    *,
    site: str | Site = "mlp_in",
    at: str | tuple[SupportsIndex, str] = "block_out",
    form: str = "affine",
    rank: int | None = 8,
    layers: Iterable[SupportsIndex] | None = None,
    tokenizer: Any = None,
    ridge: float = RIDGE,
    first_position: bool | None = None,
    iterations: int = ITERATIONS,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> SteeringSet:
    """Fit steering at one site to the shift at a later one, through the Jacobian.

    Layer by layer, each on the stream that is already steered below it, as
    `equiv.fit_sequential` does.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`; all of
            them are fitted on.
        site: Where the steering reads and writes.
        at: The later site: a name for one in the steer's own layer, (layer, name) for
            one in a fixed layer, "logits" or "output" for what the model returns.
        form: "vector", "linear" or "affine".
        rank: Rank of the map; `None` for full rank.
        layers: Layers that get steering; `None` for all below the later site.
        tokenizer: Tokenizer for texts.
        ridge: Relative ridge of the fits.
        first_position: Whether the shift at the first token of each sequence counts;
            `None`: unless it is a sink (see `equiv.steering.fits.sinks`).
        iterations: Of the solver, at most so many each time it is called.
        rounds: How often the Jacobian is taken at most: first without steering, then
            at the steering found before, as long as that leaves less.
        dtype: Compute dtype, torch.float32 or torch.float64.
        progress: Whether to show a progress bar.

    Returns:
        (layer, site) → steering. `about["layers"]` has per layer what it leaves of the
        shift that was missing: `residual` of the first round to first order, `error` as
        applied, both relative norms; the `strength` taken in the last of the `rounds`,
        at 0 there is no entry; and whether the solver `converged`, in how many
        `iterations`.

    Raises:
        SiteError: If `at` does not come after `site`.
        EquivError: As `equiv.check`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> update = {"1.bias": torch.tensor([1.0, -1.0])}
        >>> fitted = fit_downstream(model, update, torch.randn(9, 2), site="0", at="1",
        ...                         form="vector")
        >>> shift = model[1].weight @ fitted[0, "0"].vector.float()
        >>> torch.allclose(shift, update["1.bias"], atol=1e-3)
        True
    """
    check_model(model)
    form, rank = as_choice("form", form, SHARED), as_rank(rank)
    ridge, dtype = as_ridge(ridge), as_dtype(dtype)
    steps = as_integer("iterations", iterations, 1)
    rounds = as_integer("rounds", rounds, 1)
    _, key = as_site_key((0, site))
    later = as_later(at)
    update = resolve(model, delta_w)
    batches = from_inputs(model, inputs, tokenizer)
    low = low_rank_names(model, update)
    sites = (key, *later.captured)
    with (
        measured(model),
        staged(model, batches, dtype, sites=sites, low_names=low) as cut,
    ):
        walk = _Walk(
            cut,
            _Asked(key, later, form, rank, ridge, steps, rounds, first_position),
            _chosen(cut, key, later, layers),
        )
        walk.run(update, low, progress)
    about = {
        "target": "downstream",
        "at": later.key,
        "ridge": ridge,
        "layers": walk.about,
    }
    return SteeringSet(walk.steering, about=about)


def _chosen(
    cut: StagedModel,
    site: str,
    later: Later,
    layers: Iterable[SupportsIndex] | None,
) -> tuple[int, ...]:
    """The layers to steer, each before the later site."""
    asked = as_layers(layers, cut.num_layers)
    if asked is None:
        fit = [i for i in cut.layers if is_later(cut, i, site, later)]
        asked = tuple(fit) or (0,)  # none: the first says why
    for layer in asked:
        check_later(cut, layer, site, later)
    return asked


@dataclass(frozen=True)
class _Asked:
    """What is fitted in every layer."""

    site: str
    later: Later
    form: str
    rank: int | None
    ridge: float
    iterations: int
    rounds: int
    first_position: bool | None


class _Walk:
    """The steered stream on its way up, and what was fitted so far."""

    def __init__(
        self, cut: StagedModel, asked: _Asked, layers: tuple[int, ...]
    ) -> None:
        self.cut, self.asked, self.layers = cut, asked, layers
        self.hidden: dict[int, Tensor] = {}
        self.steering: dict[SiteKey, Steering] = {}
        self.about: dict[str, Mapping[str, object]] = {}

    def run(self, update: Update, low: list[str], progress: bool) -> None:
        """Fit every layer, from the first to the last."""
        from tqdm import tqdm

        later, last = self.asked.later, max(self.layers)
        with tqdm(
            total=len(self.layers), disable=not progress, desc="equiv fit_downstream"
        ) as bar:
            for stage, tensors, tuned in with_tuned(self.cut, update, low, later):
                steer: Steer = {}
                if stage.layer in self.layers:
                    steer = self._fit(stage, tuned)
                    bar.update()
                if stage.layer == last:
                    return
                for batch in range(len(self.cut.batches)):
                    self.hidden[batch], _ = self.cut.run(
                        stage, tensors, self.hidden.get(batch), batch, steer=steer
                    )

    def _fit(self, stage: Stage, tuned: Mapping[int, Tensor]) -> Steer:
        """The layer's steering, put down with what it leaves."""
        asked = self.asked
        passage = self._passage(stage.layer)
        target = passage.missing(tuned)
        if not norm(target):
            return {}
        found = fit_rounds(passage, target, self._fit_once, asked.rounds)
        self.about[str(stage.layer)] = {
            name: getattr(found, name)
            for name in ("residual", "error", "strength", "iterations", "converged")
        } | {"rounds": found.count}
        if not found.strength:
            return {}
        self.steering[stage.layer, asked.site] = found.steering
        return {asked.site: found.steering}

    def _fit_once(self, passage: Passage, target: Tensor) -> tuple[Steering, Solved]:
        asked = self.asked
        return fit_passage(
            passage, target, asked.form, asked.rank, asked.ridge, asked.iterations
        )

    def _passage(self, layer: int) -> Passage:
        road = way(self.cut, layer, self.asked.site, self.asked.later)
        return Passage(
            road,
            tuple(
                part_of(
                    road,
                    batch,
                    self.hidden.get(batch),
                    first_position=self.asked.first_position,
                )
                for batch in range(len(self.cut.batches))
            ),
        )
