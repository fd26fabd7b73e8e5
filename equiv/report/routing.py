"""Mixtures of experts: tokens that the update sends to others, and what is left of it.

The derivative holds inside the routing. Tokens whose experts the full update changes,
here or at a layer below, are therefore told apart from those that keep theirs.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from equiv.report.grid import Grid
from equiv.report.naming import ENDS, has_midpoint, in_order, place, radius
from equiv.report.numbers import counted, percent
from equiv.report.prose import Prose
from equiv.report.remainders import share_missed
from equiv.report.values import Order, Row, Unflipped, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

KEPT = (
    "Kept: tokens whose experts the update changes neither here nor at a layer below; "
    "they may attend to tokens whose experts it does change"
)


def routing(report: "Report") -> Iterator[str]:
    """How many tokens change experts, and what the remainder is without them."""
    if not report.routing:
        return
    most = max(report.routing, key=lambda entry: entry.flipped)
    if not most.flipped:
        yield (
            f"No token changes experts at any of {_mixtures(report)}: the routing, "
            "inside which the derivative holds, stays as it is."
        )
        return
    where = f"at layer {most.layer}"
    ever = ""
    if len(report.routing) > 1:
        where += ", the most of any layer"
        ever = f", {percent(report.routing[-1].flipped_so_far)} at one layer or more"
    yield (
        f"{percent(most.flipped)} of tokens change experts {where}{ever}: the "
        "derivative does not see that."
    )
    row = max(split_rows(report), key=_change, default=None)
    if row is not None and row.unflipped is not None and _change(row) > 0:
        kept = row.unflipped
        midway = (
            f" (from the midpoint {percent(kept.remainder_midpoint)} instead of "
            f"{percent(row.remainder_midpoint)})"
            if has_midpoint(report)
            else ""
        )
        yield (
            "Over the tokens that keep their experts, here and at layers below, first "
            f"order misses {percent(kept.remainder)} of the shift instead of "
            f"{percent(row.remainder)}{midway} at {place(report, row)}, where the "
            "difference is largest. They may still attend to tokens that do not."
        )
        yield from _radii(report)
    yield from _orders(report)


def split_rows(report: "Report") -> list[Row]:
    """The rows to show over all and over some tokens; none where no token flips."""
    flips = any(entry.flipped for entry in report.routing)
    return [row for row in report.rows if row.unflipped] if flips else []


def routing_table(report: "Report") -> Iterator[RenderableType]:
    """Per mixture the share that flips, and what is missed over all tokens and kept."""
    rows = split_rows(report)
    sites = in_order(row.site for row in rows if row.site not in ENDS)
    if not sites:
        return
    at_last = {row.layer: row for row in rows if row.site == sites[-1]}
    lines = []
    for entry in report.routing:
        row = at_last.get(entry.layer)
        cells = [share_missed(s) for s in (entry.flipped, entry.flipped_so_far)]
        cells += [_missed(row), _missed(row and row.unflipped)]
        lines.append([str(entry.layer), *cells])
    ways = " (base | midpoint)" if has_midpoint(report) else ""
    title = (
        "Percent of tokens that the update sends to other experts, and of the shift at "
        f"{sites[-1]} that first order misses{ways}"
    )
    header = ["layer", "here", "here or below", "missed over all", "over the kept"]
    yield Grid(title, header, lines)
    yield Prose(f"{KEPT}.")
    yield Text("")


def _missed(figures: "Row | Unflipped | None") -> str:
    if figures is None:
        return "–"
    text = share_missed(figures.remainder)
    if figures.remainder_midpoint is None:
        return text
    return f"{text} | {share_missed(figures.remainder_midpoint)}"


def _mixtures(report: "Report") -> str:
    return counted(len(report.routing), "mixture") + " of experts"


def _change(row: Row) -> float:
    """By how much of the shift the remainder changes without flipped tokens."""
    kept = row.unflipped
    if kept is None or kept.remainder is None:
        return 0.0
    pairs = (
        (row.remainder, kept.remainder),
        (row.remainder_midpoint, kept.remainder_midpoint),
    )
    return max(abs((one or 0.0) - (other or 0.0)) for one, other in pairs)


def _radii(report: "Report") -> Iterator[str]:
    """The radius over tokens that keep their experts, where that gains the most."""
    gains = [
        (part.radius.value - row.radius.value, row.radius, part.radius, row)
        for row in split_rows(report)
        if (part := row.unflipped) and part.radius and row.radius
    ]
    for gain, whole, kept, row in sorted(gains, key=itemgetter(0))[-1:]:
        if gain <= 0:
            return
        yield (
            f"Over them the radius from the base is {radius(kept)} at "
            f"{place(report, row)}, over all tokens {radius(whole)}."
        )


def _orders(report: "Report") -> Iterator[str]:
    """Rows whose order fails, and does not over the tokens that keep their experts."""
    mended = [
        row
        for row in split_rows(report)
        if _fails(report.judged_order(row))
        and (order := _judged_order(report, row)) is not None
        and not _fails(order)
    ]
    if mended:
        yield (
            f"At {counted(len(mended), 'row')} the order fails over all tokens and not "
            "over those whose experts no scale of the Taylor test changes: there it is "
            "the routing that breaks it, not the derivative."
        )


def _judged_order(report: "Report", row: Row) -> Order | None:
    assert row.unflipped is not None
    if report.subject.at == "midpoint":
        return row.unflipped.order_midpoint
    return row.unflipped.order


def _fails(order: Order) -> bool:
    return order.verdict is Verdict.FAILS
