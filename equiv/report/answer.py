"""The answer in words: headline, reason and failure text, from a report's values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from equiv.behaviour.ladder import OFFSETS
from equiv.report.naming import (
    at,
    end,
    everywhere,
    held_out,
    is_plain,
    moves_only_output,
    place,
    radius,
)
from equiv.report.numbers import between, counted, figure, percent, scale
from equiv.report.values import Behaviour, Radius, Row, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

RANDOM_INPUTS = "not measured: random inputs"
# Below this many held-out sequences the headline says how many there were.
FEW = 5
_NOT_MEASURED = "behaviour not measured: "


def headline(report: "Report") -> str:
    """Line one of every rendering."""
    return f"{_replacement(report)}; {_first_order(report)}"


def best(report: "Report") -> Behaviour | None:
    """The fitted steering of all layers at once that recovers most.

    Full rank counts only where nothing smaller was fitted.
    """
    fitted = [
        row
        for row in report.behaviour
        if row.layers == "all" and row.num_parameters and row.recovered is not None
    ]
    small = [row for row in fitted if "full" not in row.rung]
    return max(small or fitted, key=lambda row: row.recovered or 0.0, default=None)


def unsteered(report: "Report") -> Behaviour | None:
    """The row of the base model without steering."""
    return next((row for row in report.behaviour if row.rung == "unsteered"), None)


def exact_oracle(report: "Report") -> Behaviour | None:
    """The exact oracle at the site that the best fitted steering writes."""
    return _beside_the_best(report, "exact oracle")


def offsets(report: "Report") -> Behaviour | None:
    """The simultaneous offsets at the site that the best fitted steering writes."""
    return _beside_the_best(report, OFFSETS)


def _beside_the_best(report: "Report", rung: str) -> Behaviour | None:
    row = best(report)
    found = (b for b in report.behaviour if row is not None and b.writes == row.writes)
    return next((b for b in found if b.rung == rung), None)


def reason(report: "Report") -> str:
    """Why `report.holds` is what it is."""
    drawn = " (on random inputs)" if report.subject.inputs == "random" else ""
    if not report.derivative_holds:
        return _not_established(report) + drawn
    if failing := report.failing():
        return _first_of(report, failing) + drawn
    limit = report.subject.max_remainder
    order = "third" if report.subject.at == "midpoint" else "second"
    if limit is None:
        return f"{order} order or exact at {everywhere(report)}{drawn}"
    return (
        f"{order} order or exact, and the remainder at full size is at most "
        f"{figure(limit)} of the shift, at {everywhere(report)}{drawn}"
    )


def failure(report: "Report") -> str:
    """The message of `NotEquivalentError`."""
    failing = report.failing()
    if not failing:
        return f"The equivalence could not be established: {reason(report)}."
    lines = [
        f"First-order equivalence fails at {len(failing)} of {len(report.rows)} rows "
        f"(layer, site, scope) for {report.subject.update}:"
    ]
    lines += [f"  {_complaint(report, row)}" for row in failing]
    lines.append(
        "`print(report)` shows every layer; `update.scaled(t)` with t within the "
        "radius passes; `max_remainder=None` asks for the order alone."
    )
    return "\n".join(lines)


def wrong_orders(report: "Report") -> list[Row]:
    """The rows whose order fails or could not be seen, those that fail first."""
    return [
        row
        for verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE)
        for row in report.rows
        if report.judged_order(row).verdict is verdict
    ]


def smallest(radii: Sequence[Radius | None]) -> Radius | None:
    """The radius within which every row is."""
    known = [r for r in radii if r is not None]
    return min(known, key=lambda r: (r.value, r.at_least), default=None)


def why_not_judged(report: "Report") -> str:
    """Why there is no order to speak of."""
    what = report.judged_order(report.rows[0]).reason if report.rows else ""
    return what or "nothing was measured"


def _not_established(report: "Report") -> str:
    if wrong := wrong_orders(report):
        return _first_of(report, wrong)
    return f"no layer and site could be judged: {why_not_judged(report)}"


def _first_of(report: "Report", rows: Sequence[Row]) -> str:
    more = f"; and {counted(len(rows) - 1, 'more row')}" if len(rows) > 1 else ""
    return f"{_complaint(report, rows[0])}{more}"


def _complaint(report: "Report", row: Row) -> str:
    where, order = place(report, row), report.judged_order(row)
    if order.verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE):
        return f"{where}: {order.verdict}: {order.reason}"
    remainder = figure(report.judged_remainder(row))
    limit = figure(report.subject.max_remainder)
    midpoint = report.subject.at == "midpoint"
    within = radius(row.radius_midpoint if midpoint else row.radius)
    return (
        f"{where}: remainder {remainder} of the shift at full size, expected at most "
        f"{limit}; radius {within}"
    )


def _replacement(report: "Report") -> str:
    none, row = unsteered(report), best(report)
    if none is None:
        return f"What steering replaces: {why_no_behaviour(report)}"
    if row is None or row.recovered is None:
        return (
            "Steering has nothing to replace: the update does not change the output on "
            f"the {held_out(report)}"
        )
    name = "KL" if row.measure == "kl" else "output difference"
    before = f"{name} {figure(none.distance)}"
    few = report.subject.held_out_sequences < FEW
    where = f" on {held_out(report)}" if few else ""
    if moves_only_output(report):
        return (
            "Steering does not replace this update: it moves nothing before the "
            f"{end(report)}, so there is nothing for steering to stand in for "
            f"({before} unsteered{where})"
        )
    if row.strength == 0 or row.recovered <= 0:
        return (
            "Steering does not replace this update: worse than no steering at every "
            f"strength tried ({before} unsteered{where})"
        )
    interval = ""
    if row.recovered_low is not None and row.recovered_high is not None:
        found = between(row.recovered_low, row.recovered_high)
        interval = f", 95 % interval {found}"
    return (
        f"Steering replaces {percent(row.recovered)} of this update ({before} → "
        f"{figure(row.distance)}{where}{interval}): {_by(report, row)}"
    )


def _by(report: "Report", row: Behaviour) -> str:
    """Which steering, where, and how large it is."""
    layers = "" if is_plain(report) else ", all layers"
    share = percent(row.parameter_share)
    size = "" if row.parameter_share is None else f", {share} of the parameters"
    return f"{row.rung} {at(row.site)}{layers}{size}"


def why_no_behaviour(report: "Report") -> str:
    """Why nothing was steered."""
    if report.subject.inputs == "random":
        return RANDOM_INPUTS
    for note in report.notes:
        if note.startswith(_NOT_MEASURED):
            return note.removeprefix("behaviour ")
    return "not measured"


def _first_order(report: "Report") -> str:
    if not report.derivative_holds:
        return f"first order is not established: {reason(report)}"
    if report.subject.inputs == "random":
        return f"first order is right at {everywhere(report)} (size {RANDOM_INPUTS})"
    base = smallest([row.radius for row in report.rows])
    midpoint = smallest([row.radius_midpoint for row in report.rows])
    parts = []
    if base is not None:
        parts.append(f"{_reach(base)} from the base")
    if midpoint is not None:
        parts.append(f"{_reach(midpoint)} from the midpoint")
    if not parts:
        return f"first order is right at {everywhere(report)}"
    return "first order holds " + ", ".join(parts)


def _reach(value: Radius) -> str:
    if value.value >= 1:
        return "for all of it"
    return f"to t = {scale(value.value)}"
