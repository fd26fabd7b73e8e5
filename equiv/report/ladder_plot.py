"""The ladder as a picture: what each way of steering recovers, a line per column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equiv.behaviour.ladder import OFFSETS
from equiv.errors import ArgumentError
from equiv.report.answer import unsteered
from equiv.report.drawing import COLOURS, GREY, MARKERS, blank, clean
from equiv.report.naming import is_plain
from equiv.report.numbers import percent
from equiv.report.rungs import columns, columns_of
from equiv.report.values import Behaviour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from equiv.report.report import Report

# Room left below and above everything that is on the scale.
_MARGIN = 0.08


def ladder(report: "Report") -> "Figure":
    """What each way of steering recovers of the update's behaviour, a line per site.

    Raises:
        ArgumentError: If the report has no behaviour.
        MissingExtraError: If matplotlib is not installed.
    """
    none = unsteered(report)
    if none is None:
        raise ArgumentError(
            "This report has no behaviour to plot: expected a check with inputs."
        )
    rows = [row for row in report.behaviour if row.layers == "all" and row.site]
    rungs = ["unsteered", *dict.fromkeys(row.rung for row in rows)]
    made = blank(9.0, 4.4)
    axes = made.subplots()
    clean(axes)
    sites = columns(rows)
    for i, site in enumerate(sites):
        own = [row for row in rows if site in columns_of(row, sites)]
        _ladder_line(axes, site, own, rungs, i)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.axhline(0, color=GREY, linewidth=0.8)
    _off_the_scale(axes, rows, rungs)
    names = [rung.replace(" oracle", "\noracle") for rung in rungs]
    names = [name.replace(" offsets", "\noffsets") for name in names]
    axes.set_xticks(range(len(rungs)), names)
    what = "KL to the tuned model" if none.measure == "kl" else "output difference"
    axes.set_ylabel(f"share of the {what} recovered")
    plain = is_plain(report)
    title = "One site steered at a time" if plain else "All layers steered at one site"
    if any(row.recovered_low is not None for row in rows):
        title += "; bars are 95 % bootstrap intervals"
    axes.set_title(title, loc="left", fontsize=10, color=GREY)
    axes.legend(frameon=False, loc="best")
    return made


def _ladder_line(
    axes: "Axes", site: str, rows: Sequence[Behaviour], rungs: Sequence[str], i: int
) -> None:
    """One column's points with their intervals; offsets, no step up, stand apart."""
    style: dict[str, Any] = {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.5,
        "elinewidth": 1,
        "capsize": 2,
    }
    offset = 0.05 * (i - 1.5)  # sites side by side, so that bars stay apart
    climbed = [(offset, 0.0, 0.0, 0.0)]
    apart = []
    for row in rows:
        if row.recovered is not None:
            into = apart if row.rung == OFFSETS else climbed
            into.append((rungs.index(row.rung) + offset, *_with_bar(row)))
    x, y, *bars = zip(*climbed, strict=True)
    axes.errorbar(x, y, yerr=bars, label=site.replace("->", " → "), **style)
    for x, y, down, up in apart:
        axes.errorbar([x], [y], yerr=[[down], [up]], **style)


def _with_bar(row: Behaviour) -> tuple[float, float, float]:
    """(recovered, how far its interval reaches down, how far up)."""
    y = row.recovered or 0.0
    low = y if row.recovered_low is None else row.recovered_low
    high = y if row.recovered_high is None else row.recovered_high
    return y, max(0.0, y - low), max(0.0, high - y)


def _off_the_scale(
    axes: "Axes", rows: Sequence[Behaviour], rungs: Sequence[str]
) -> None:
    """Cut the axis below everything but offsets, which may be worse many times over."""
    others = [_with_bar(row) for row in rows if row.rung != OFFSETS]
    bottom = min(0.0, *(y - down for y, down, _ in others)) - _MARGIN
    top = max(1.0, *(y + up for y, _, up in others)) + _MARGIN
    sites = columns(rows)
    below = [
        (COLOURS[i % len(COLOURS)], row.recovered)
        for i, site in enumerate(sites)
        for row in rows
        if row.rung == OFFSETS and site in columns_of(row, sites)
        if row.recovered is not None and row.recovered < bottom
    ]
    axes.set_ylim(bottom, top)
    for k, (colour, recovered) in enumerate(below):
        axes.annotate(
            f"↓ {percent(recovered)}",
            (rungs.index(OFFSETS), 0),
            xycoords=("data", "axes fraction"),
            xytext=(-10, 4 + 11 * k),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontsize=8,
        )
