"""`equiv convert`: a fine-tune turned into steering, with what that loses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from torch import nn

from equiv.behaviour.calibrating import calibrate
from equiv.behaviour.evaluating import Evaluation, evaluate
from equiv.designing.values import Design
from equiv.errors import ArgumentError, InputsError
from equiv.model.rows import Text
from equiv.report.grid import Grid
from equiv.report.numbers import between, counted, figure, percent
from equiv.report.prose import Prose
from equiv.steering.fits.plan import Planned
from equiv.steering.forms.steering_set import SteeringSet
from equiv.targets import fit_steering
from equiv.update.update import Update

# Of the texts: what is fitted on, and what the strength is chosen on; the rest is
# what is reported.
FITTED, CHOSEN_ON = 0.6, 0.2
LEAST = 5


@dataclass(frozen=True)
class Wanted:
    """What steering to make, as `equiv.fit_steering` takes it."""

    site: str
    form: str
    rank: int | None
    target: str
    at: str | None
    plan: tuple[Planned, ...] | None
    seed: int


def read_plan(path: Path) -> tuple[Planned, ...]:
    """The steers of a design that `equiv design --json` wrote.

    Raises:
        FileFormatError: If the file is no design.
        ArgumentError: If the design has no steers.
    """
    design = Design.from_json(path)
    if not design.choices:
        raise ArgumentError(
            f"{path}: this design has no steers: nothing within its budget helps."
        )
    return design.plan


def converted(
    model: nn.Module,
    update: Update,
    texts: Sequence[Text | dict[str, Text]],
    tokenizer: Any,
    wanted: Wanted,
    *,
    progress: bool = False,
) -> tuple[SteeringSet, Evaluation]:
    """Fitted steering at its best strength, and what it does on texts of its own.

    Raises:
        InputsError: If there are fewer than five texts.
        EquivError: As `equiv.fit_steering`.
    """
    fitting, choosing, unseen = _parts(texts, wanted.seed)
    fitted = fit_steering(
        model,
        update,
        fitting,
        site=wanted.site,
        form=wanted.form,
        rank=wanted.rank,
        target=wanted.target,
        at=wanted.at,
        plan=wanted.plan,
        tokenizer=tokenizer,
        seed=wanted.seed,
        progress=progress,
    )
    steering = calibrate(model, update, choosing, fitted, tokenizer=tokenizer)
    found = evaluate(
        model, update, unseen, steering, tokenizer=tokenizer, seed=wanted.seed
    )
    return replace(steering, about={**steering.about, **measured(found)}), found


def measured(found: Evaluation) -> dict[str, object]:
    """The figures that go into a steering's file."""
    return {
        "measure": found.measure,
        "unsteered": found.unsteered,
        "steered": found.steered,
        "recovered": found.recovered,
        "same_top": found.same_top,
        "misfits": {str(layer): misfit for layer, misfit in found.misfits},
        "sequences": found.sequences,
        "tokens": found.tokens,
    }


def rendered(
    found: Evaluation, steering: SteeringSet, update: Update, wanted: Wanted
) -> RenderableType:
    """What was made and what is lost, for a console."""
    return Group(*_paragraphs(found, steering, update, wanted))


def _paragraphs(
    found: Evaluation, steering: SteeringSet, update: Update, wanted: Wanted
) -> Iterator[RenderableType]:
    name = "KL" if found.measure == "kl" else "output difference"
    if not len(steering):
        yield Prose(
            f"Not converted: {_what(wanted)} is no better than no steering at any "
            "strength tried. Try another site, more texts, or a higher rank.",
            style="bold",
        )
    else:
        low_high = found.interval and f", 95 % interval {between(*found.interval)}"
        yield Prose(
            f"Steering replaces {percent(found.recovered)} of {update.source} "
            f"({name} {figure(found.unsteered)} → {figure(found.steered)}"
            f"{low_high or ''}): {_what(wanted)}, "
            f"{counted(len(steering), 'steer')}, strength "
            f"{figure(float(str(steering.about['strength'])))}",
            style="bold",
        )
    yield Prose("")
    yield Grid("What is lost", ["", "update", "steering"], _rows(found, name))
    yield Prose("")
    misfits = [[str(layer), percent(misfit)] for layer, misfit in found.misfits]
    if misfits:
        yield Grid(
            "Share of the block output's shift that is left", ["layer", "left"], misfits
        )
    yield Prose(
        f"\nMeasured on {counted(found.sequences, 'text')} "
        f"({counted(found.tokens, 'token')}) that neither the fit nor the choice of "
        "the strength has seen."
    )


def _what(wanted: Wanted) -> str:
    if wanted.plan is not None:
        return "the plan"
    if wanted.form in ("vector", "heads"):
        return f"{wanted.form} at {wanted.site}"
    rank = "of full rank" if wanted.rank is None else f"r{wanted.rank}"
    return f"{wanted.form} {rank} at {wanted.site}"


def _rows(found: Evaluation, name: str) -> list[list[str]]:
    share = found.num_parameters / found.update_parameters
    rows = [
        [f"{name} to the tuned model", "0", figure(found.steered)],
        [f"{name} recovered", "100 %", percent(found.recovered)],
        ["same likeliest token", "100 %", percent(found.same_top)],
        ["parameters", f"{found.update_parameters:,}", f"{found.num_parameters:,}"],
        ["", "", f"{percent(share)} of the update's"],
    ]
    return [row for row in rows if found.same_top is not None or "token" not in row[0]]


def _parts(
    texts: Sequence[Text | dict[str, Text]], seed: int
) -> tuple[Sequence[object], Sequence[object], Sequence[object]]:
    """Texts to fit on, to choose the strength on, and to report on."""
    if len(texts) < LEAST:
        raise InputsError(
            f"Expected at least {LEAST} texts to convert with (to fit on, to choose "
            f"the strength on, and to measure what is lost), got {len(texts)}."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    first = round(FITTED * len(texts))
    second = max(first + 1, round((FITTED + CHOSEN_ON) * len(texts)))
    drawn = [texts[i] for i in order]
    return drawn[:first], drawn[first:second], drawn[second:]
