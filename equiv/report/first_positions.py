"""First positions, where attention sinks are: figures with and without them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from equiv.report.naming import place, radius
from equiv.report.numbers import counted, figure, percent
from equiv.report.values import Row, Scope
from equiv.shift.measures import apart
from equiv.shift.radius import APART
from equiv.steering.fits.sinks import SINK

if TYPE_CHECKING:
    from equiv.report.report import Report


def first_positions(report: "Report") -> Iterator[str]:
    """Whether there is a sink, and what the remainder is without first positions."""
    if not report.first_positions:
        return
    largest = max(report.first_positions, key=lambda position: position.times)
    times = f"{figure(largest.times, 2)} ×"
    layers = [p.layer for p in report.first_positions if p.sink]
    if layers:
        yield (
            f"There is an attention sink after {_named(layers)}: at the first position "
            f"the stream is up to {times} as large as elsewhere. Fits leave it out "
            "in every batch where it is so; remainders and radii do not."
        )
    else:
        yield (
            "There is no attention sink: at the first position the stream is at most "
            f"{times} as large as elsewhere (a sink is more than {SINK:g} ×)."
        )
    row = max(told_apart(report), key=_base_change, default=None)
    if row is not None and row.rest is not None and _base_change(row) > 0:
        yield (
            f"Without first positions the remainder changes most at "
            f"{place(report, row)}: {percent(row.remainder)} of the shift with them, "
            f"{percent(row.rest.remainder)} without{_radius(row)}."
        )


def _radius(row: Row) -> str:
    """Both radii from the base, where first positions have made one of their own."""
    if row.radius is None or row.rest is None or row.rest.radius is None:
        return ""
    with_, without = radius(row.radius), radius(row.rest.radius)
    return f"; the radius is {with_} with them, {without} without"


def told_apart(report: "Report") -> list[Row]:
    """The rows to show with and without first positions; none where it is all one."""
    rows = [r for r in report.rows if r.rest and r.scope is Scope.PROPAGATED]
    sink = any(p.sink for p in report.first_positions)
    return rows if sink or any(_change(r) > APART for r in rows) else []


def _change(row: Row) -> float:
    """The larger relative change of the two remainders."""
    if row.rest is None:
        return 0.0
    pairs = (
        (row.remainder, row.rest.remainder),
        (row.remainder_midpoint, row.rest.remainder_midpoint),
    )
    return max(apart(one, other) for one, other in pairs)


def _base_change(row: Row) -> float:
    """The relative change of the remainder from the base, which the sentence tells."""
    return 0.0 if row.rest is None else apart(row.remainder, row.rest.remainder)


def _named(layers: Sequence[int]) -> str:
    """Layers by number, or how many where they are many."""
    if len(layers) > 4:
        return f"{counted(len(layers), 'layer')} from {layers[0]} to {layers[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
