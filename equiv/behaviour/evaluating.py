"""`equiv.evaluate`: what a steered model does, against the tuned one, on given inputs.

Three streams pass the blocks together: base, tuned and steered. Per layer,

    misfit = Σ ‖tuned − steered‖² / Σ ‖tuned − base‖²    at the block's output

is what steering up to there leaves of the shift; at the output it is the distance that
`equiv.behaviour.distance` defines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equiv.arguments import as_dtype, as_seed
from equiv.behaviour.distance import Distances, interval, recovered
from equiv.errors import ArgumentError
from equiv.model.batches import Batch
from equiv.model.guard import check_model, measured
from equiv.model.inputs import from_inputs
from equiv.model.sites import LOGITS, SiteKey
from equiv.model.stages import Stage, StagedModel, staged
from equiv.shift.measures import counted, squares
from equiv.shift.propagate import propagate
from equiv.shift.stage_update import low_rank_names
from equiv.shift.traces import TUNED, Point
from equiv.steering.applying.apply import by_layer
from equiv.steering.forms.form import Steering
from equiv.update.low_rank import LowRank
from equiv.update.sources import resolve
from equiv.update.update import Update


@dataclass(frozen=True)
class Evaluation:
    """A steered model against the tuned model, over the tokens that count.

    Attributes:
        measure: "kl" (logits: nats per token) or "output" (squared relative difference
            of the output).
        unsteered: That distance of the base model.
        steered: Of the steered model.
        recovered: 1 − steered / unsteered; `None` if the update does nothing.
        interval: Its 95 % bootstrap interval over sequences; `None` if there is none.
        same_top: Share of tokens with the tuned model's likeliest token; `None`
            without logits.
        misfits: (layer, share of the block output's shift that is left), where the
            update has reached.
        num_parameters: Of the steering.
        update_parameters: Of the update: its factors where it has some, else its
            entries.
        sequences: How many sequences were run.
        tokens: How many tokens counted.
    """

    measure: str
    unsteered: float
    steered: float
    recovered: float | None
    interval: tuple[float, float] | None
    same_top: float | None
    misfits: tuple[tuple[int, float], ...]
    num_parameters: int
    update_parameters: int
    sequences: int
    tokens: int


def evaluate(
    model: nn.Module,
    delta_w: object,
    inputs: object,
    steering: Mapping[SiteKey, Steering],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Evaluation:
    """Measure what steering recovers of what an update does.

    Give inputs that the steering was not fitted on, or the figures flatter it.

    Args:
        model: A Hugging Face model of a known family, or any module.
        delta_w: The update, in any form that `equiv.check` takes.
        inputs: Texts, a tensor, a mapping or an iterable, as for `equiv.check`.
        steering: (layer, site) → steering, applied to every token.
        tokenizer: Tokenizer for texts.
        dtype: Compute dtype, torch.float32 or torch.float64.
        seed: Draws the bootstrap.

    Raises:
        ArgumentError: If the steering is for some positions only.
        EquivError: As `equiv.check` and `equiv.steer`.

    Example:
        >>> from equiv.steering.forms.vector import Vector
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
        >>> update = {"0.bias": torch.tensor([1.0, -1.0])}
        >>> x = torch.randn(5, 2)
        >>> exact = {(0, "0"): Vector(torch.tensor([1.0, -1.0]))}
        >>> round(evaluate(model, update, x, exact).recovered, 6)
        1.0
    """
    check_model(model)
    dtype, seed = as_dtype(dtype), as_seed(seed)
    update = resolve(model, delta_w)
    batches = from_inputs(model, inputs, tokenizer)
    with measured(model):
        return evaluated(model, update, batches, [steering], dtype, seed)[0]


def evaluated(
    model: nn.Module,
    update: Update,
    batches: Sequence[Batch],
    candidates: Sequence[Mapping[SiteKey, Steering]],
    dtype: torch.dtype,
    seed: int,
) -> list[Evaluation]:
    """Every candidate's evaluation, with one base and one tuned stream for all.

    Arguments as for `evaluate`; memory holds a hidden state of all tokens for each.
    """
    for steering in candidates:
        _check_positions(steering)
    steers = [by_layer(steering) for steering in candidates]
    sites = dict.fromkeys(s for found in steers for own in found.values() for s in own)
    low = low_rank_names(model, update)
    chosen = tuple(sites) or None
    with staged(model, batches, dtype, sites=chosen, low_names=low) as cut:
        runs = [_Run(cut, found) for found in steers]
        points = (Point(0.0), TUNED)
        for stage, tensors, traces in propagate(cut, update, points, low=low):
            for trace in traces:
                # The head computes these anew whenever it is asked.
                site = "block_out" if stage.name == "block" else stage.output
                base, tuned = (trace.values[s][site] for s in (0.0, 1.0))
                for run in runs:
                    run.add(stage, tensors, trace.batch, base, tuned)
    size = _size(update)
    return [
        run.evaluation(_count(found), size, seed)
        for run, found in zip(runs, steers, strict=True)
    ]


def _check_positions(steering: Mapping[SiteKey, Steering]) -> None:
    if (positions := getattr(steering, "positions", "all")) != "all":
        raise ArgumentError(
            f"Expected steering of all positions, got {positions!r}: what it recovers "
            "of a whole text says nothing then. Compare outputs under `equiv.steer`."
        )


def _count(steers: Mapping[int, Mapping[str, object]]) -> int:
    found = (steering for own in steers.values() for steering in own.values())
    return sum(getattr(steering, "num_parameters", 0) for steering in found)


def _size(update: Update) -> int:
    """Numbers that the update is stored as."""
    return sum(
        d.left.numel() + d.right.numel() if isinstance(d, LowRank) else d.numel()
        for d in update.deltas.values()
    )


class _Run:
    """The steered stream of every batch, and the sums of what is left."""

    def __init__(
        self,
        cut: StagedModel,
        steers: Mapping[int, Mapping[str, Callable[[Tensor], Tensor]]],
    ) -> None:
        for layer, own in steers.items():
            for site in own:
                cut.check_site(layer, site)
        self.cut, self.steers = cut, steers
        self.hidden: dict[int, Tensor] = {}
        self.left: dict[int, float] = {}
        self.whole: dict[int, float] = {}
        self.unsteered: Distances | None = None
        self.steered: Distances | None = None

    def add(
        self,
        stage: Stage,
        tensors: Mapping[str, Tensor],
        batch: int,
        base: Tensor,
        tuned: Tensor,
    ) -> None:
        """One batch through one stage, beside what it does in the other two models."""
        steer = self.steers.get(stage.layer, {}) if stage.name != "head" else {}
        hidden = self.hidden.get(batch)
        out, _ = self.cut.run(stage, tensors, hidden, batch, steer=steer)
        self.hidden[batch] = out
        if stage.name == "block":
            own = self.cut.parted(stage, out, batch)[1]
            mask = self.cut.mask(stage, batch)
            for sums, other in ((self.left, own), (self.whole, base)):
                square = squares(counted(tuned - other, mask))
                sums[stage.layer] = sums.get(stage.layer, 0.0) + square
        elif stage.name in ("head", "module"):
            self._compare(tuned, base, out, batch)
            del self.hidden[batch]

    def _compare(self, tuned: Tensor, base: Tensor, out: Tensor, batch: int) -> None:
        # One logit alone is no distribution: a regression's output.
        classes = self.cut.output_site == LOGITS and tuned.shape[-1] > 1
        self.unsteered = self.unsteered or Distances(has_logits=classes)
        self.steered = self.steered or Distances(has_logits=classes)
        entry = self.cut.batches[batch]
        self.unsteered.add(tuned, base, entry.mask, entry.labels)
        self.steered.add(tuned, out, entry.mask, entry.labels)

    def evaluation(self, count: int, update: int, seed: int) -> Evaluation:
        """Everything put together."""
        none, found = self.unsteered, self.steered
        assert none is not None and found is not None
        low, high = interval(found, none, seed)
        kl = found.has_logits
        return Evaluation(
            measure="kl" if kl else "output",
            unsteered=none.mean,
            steered=found.mean,
            recovered=recovered(found, none),
            interval=None if low is None or high is None else (low, high),
            same_top=found.same_top / found.tokens if kl and found.tokens else None,
            misfits=tuple(
                (layer, self.left[layer] / whole)
                for layer, whole in sorted(self.whole.items())
                if whole
            ),
            num_parameters=count,
            update_parameters=update,
            sequences=found.sequences,
            tokens=found.tokens,
        )
