"""Remainders and radii by layer and site: shaded tables on a console."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from equiv.report.grid import Grid
from equiv.report.naming import has_midpoint, in_order, is_plain, reach
from equiv.report.numbers import figure, percent
from equiv.report.prose import Prose
from equiv.report.values import Row, Scope, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

# Remainders up to each bound, with the shade and colour that stand for them.
_SHADES = (
    (0.01, "·", "on #1a9850"),
    (0.1, "░", "on #91cf60"),
    (0.3, "▒", "on #fee08b"),
    (0.6, "▓", "on #fc8d59"),
    (float("inf"), "█", "on #d73027"),
)


def remainder_tables(report: "Report") -> Iterator[RenderableType]:
    """What first order misses at full size, and how far it reaches."""
    rows = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    ways = "the base | midpoint" if has_midpoint(report) else "the base"
    limit = percent(report.subject.tolerance)
    title = f"Percent of the shift that first order misses, from {ways}"
    within = f"Radius: share of the update up to which it misses at most {limit}"
    measured = any(row.radius is not None for row in rows)
    missed = [_missed(report, row) for row in rows]
    if is_plain(report):
        lines = [[r.site, m, _reaches(r)] for r, m in zip(rows, missed, strict=True)]
        shown = 2 + measured
        header = ["site", "missed", "radius"][:shown]
        yield Grid(title, header, [line[:shown] for line in lines])
    else:
        yield _by_layer(title, rows, missed)
    yield Prose(_legend())
    if measured and is_plain(report):
        yield Prose(f"{within}.")
    elif measured:
        yield Text("")
        yield _by_layer(within, rows, [_reaches(row) for row in rows])


def share_missed(share: float | None) -> str:
    """The number alone: the title says that it is percent."""
    if share is None:
        return "–"
    return f"{100 * share:,.0f}" if share >= 0.995 else figure(100 * share, 2)


def _by_layer(title: str, rows: list[Row], cells: list[Text]) -> Grid:
    """A line per layer, a column per site; the model's output in a line of its own."""
    layers = list(dict.fromkeys(row.layer for row in rows))
    sites = in_order(row.site for row in rows if row.layer < layers[-1])
    found = {(r.layer, r.site): cell for r, cell in zip(rows, cells, strict=True)}
    lines = [
        [str(layer), *(found.get((layer, site), Text("")) for site in sites)]
        for layer in layers[:-1]
    ]
    filler = [Text("")] * (len(sites) - 1)
    ends = [row.site for row in rows if row.layer == layers[-1]]
    lines += [[site, *filler, found[layers[-1], site]] for site in ends]
    return Grid(title, ["layer", *sites], lines)


def _missed(report: "Report", row: Row) -> Text:
    if row.order.verdict is Verdict.NOT_APPLICABLE:
        return Text("no shift", style="dim")
    text = share_missed(row.remainder)
    if row.remainder_midpoint is not None:
        text += f" | {share_missed(row.remainder_midpoint)}"
    return _shaded(report.judged_remainder(row), text)


def _reaches(row: Row) -> Text:
    if row.radius_midpoint is None:
        return Text(reach(row.radius))
    return Text(f"{reach(row.radius)} | {reach(row.radius_midpoint)}")


def _shaded(value: float | None, text: str) -> Text:
    if value is None:
        return Text(text)
    _, shade, style = next(entry for entry in _SHADES if value <= entry[0])
    return Text.assemble((shade * 2, f"black {style}"), " ", text)


def _legend() -> str:
    bounds = [
        f"{shade * 2} ≤ {percent(bound)}"
        if bound != float("inf")
        else f"{shade * 2} more"
        for bound, shade, _ in _SHADES
    ]
    return " ".join(bounds)
