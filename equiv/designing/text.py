"""A design as text: what to fit, what it is worth, and how far to trust that."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from equiv.report.grid import Grid
from equiv.report.naming import at, differ
from equiv.report.numbers import counted, percent
from equiv.report.prose import Prose
from equiv.report.text import WIDTH

if TYPE_CHECKING:
    from equiv.designing.values import Design


def to_text(design: "Design") -> str:
    """The design as plain text, at most 80 columns wide."""
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(rendered(design))
    lines = (line.rstrip() for line in captured.get().splitlines())
    return "\n".join(lines)


def rendered(design: "Design") -> RenderableType:
    """The design as something that a rich console prints, whatever its width."""
    return Group(*_sections(design))


def headline(design: "Design") -> str:
    """What is chosen, and what it is worth, in one sentence."""
    if not design.choices:
        return f"Nothing within {design.budget:,} numbers helps"
    return (
        f"{counted(len(design.choices), 'steer')} with {design.num_parameters:,} of "
        f"{design.budget:,} numbers: predicted to recover {percent(design.predicted)} "
        f"of the change in behaviour{_of_reach(design)}"
    )


def _of_reach(design: "Design") -> str:
    if design.reachable > 0.995:
        return ""
    return f" ({percent(design.reachable)} is within reach; the head adds the rest)"


def _sections(design: "Design") -> Iterator[RenderableType]:
    yield Prose(f"{headline(design)}.", style="bold")
    if design.choices:
        yield Text("")
        yield _table(design)
        for choice in design.choices:
            yield Prose(f"Layer {choice.layer}: {choice.why}.")
    if design.even is not None:
        even = design.even
        yield Text("")
        yield Prose(
            f"The same map in every layer, {even.steering} {at(even.site)} with "
            f"{even.num_parameters:,} numbers: {percent(even.predicted)}."
        )
    measured = [trial for trial in design.tried if trial.measured is not None]
    if measured:
        yield Text("")
        yield Grid(
            "How far to trust it: the same prediction for what was measured",
            ["in every layer", "predicted", "measured"],
            [
                [
                    f"{trial.steering} {at(trial.site)}",
                    percent(trial.predicted),
                    percent(trial.measured),
                ]
                for trial in measured
            ],
        )


def _table(design: "Design") -> Grid:
    pairs = differ(choice.site for choice in design.choices)
    places = ["reads", "writes"] if pairs else ["site"]
    rows = [
        [
            str(choice.layer),
            *([choice.reads, choice.writes] if pairs else [choice.site]),
            choice.steering,
            f"{choice.num_parameters:,}",
            percent(choice.gain),
        ]
        for choice in design.choices
    ]
    heads = ["layer", *places, "steering", "numbers", "worth"]
    return Grid("What to fit, and what would be lost without it", heads, rows)
