"""The answer in words: headline, reason and failure text, from a report's values."""

from typing import TYPE_CHECKING

from equiv.report.numbers import figure, percent, scale
from equiv.report.values import Behaviour, Radius, Row, Subject, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

RANDOM_INPUTS = "not measured: random inputs"


def headline(report: "Report") -> str:
    """Line one of every rendering."""
    return f"{_replacement(report)}; {_first_order(report)}"


_KINDS = {
    "random": "random inputs",
    "samples": "samples of both models",
    "texts": "texts",
    "given": "given inputs",
}


def inputs(subject: Subject) -> str:
    """What was measured on, in words."""
    held = subject.held_out_sequences
    return (
        f"{_KINDS.get(subject.inputs, subject.inputs)}: {subject.tokens:,} tokens in "
        f"{subject.sequences:,} sequences" + (f", {held:,} held out" if held else "")
    )


def best(report: "Report") -> Behaviour | None:
    """The fitted steering of all layers at once that recovers most."""
    fitted = [
        row
        for row in report.behaviour
        if row.layers == "all" and row.num_parameters and row.recovered is not None
    ]
    shares = [row for row in fitted if _is_small(row)]
    return max(shares or fitted, key=lambda row: row.recovered or 0.0, default=None)


def unsteered(report: "Report") -> Behaviour | None:
    """The row of the base model without steering."""
    return next((row for row in report.behaviour if row.rung == "unsteered"), None)


def reason(report: "Report") -> str:
    """Why `report.holds` is what it is."""
    failing = report.failing()
    if not failing and not report.derivative_holds:
        return "no layer and site could be judged: " + (
            report.rows[0].order.reason if report.rows else "nothing was measured"
        )
    drawn = " (on random inputs)" if report.subject.inputs == "random" else ""
    if failing:
        first = failing[0]
        more = f"; and {len(failing) - 1} more rows" if len(failing) > 1 else ""
        return f"{_complaint(report, first)}{more}{drawn}"
    limit = report.subject.max_remainder
    if limit is None:
        return f"second order or exact at every layer and site{drawn}"
    return (
        "second order or exact, and the remainder at full size is at most "
        f"{figure(limit)} of the shift, at every layer and site{drawn}"
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


def _complaint(report: "Report", row: Row) -> str:
    where = f"layer {row.layer}, {row.site}, {row.scope}"
    if row.order.verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE):
        order = "" if row.order.order is None else f", order {row.order.order:.2f}"
        return f"{where}: {row.order.verdict}{order}: {row.order.reason}"
    remainder = figure(report.judged_remainder(row))
    limit = figure(report.subject.max_remainder)
    midpoint = report.subject.at == "midpoint"
    within = radius(row.radius_midpoint if midpoint else row.radius)
    return (
        f"{where}: remainder {remainder} of the shift at full size, expected <= "
        f"{limit}; radius {within}"
    )


def radius(value: Radius | None) -> str:
    """A radius in words, for instance `t = 0.36` or `t >= 4`."""
    if value is None:
        return "not measured"
    sign = ">=" if value.at_least else "="
    return f"t {sign} {scale(value.value)}"


def _is_small(row: Behaviour) -> bool:
    return "full" not in row.rung


def _replacement(report: "Report") -> str:
    none = unsteered(report)
    row = best(report)
    if none is None or row is None or row.recovered is None:
        return f"What steering replaces: {_why_not_measured(report)}"
    unit = "KL" if row.measure == "kl" else "output difference"
    if row.strength == 0 or row.recovered <= 0:
        return (
            "Steering does not replace this update: worse than no steering at every "
            f"strength tried ({unit} {figure(none.distance)} unsteered)"
        )
    interval = ""
    if row.recovered_low is not None and row.recovered_high is not None:
        low, high = percent(row.recovered_low), percent(row.recovered_high)
        interval = f", 95 % interval {low.removesuffix(' %')}–{high}"
    share = (
        ""
        if row.parameter_share is None
        else f", {percent(row.parameter_share)} of the parameters"
    )
    return (
        f"Steering replaces {percent(row.recovered)} of this update ({unit} "
        f"{figure(none.distance)} → {figure(row.distance)}{interval}): {row.rung} at "
        f"{row.site}, all layers{share}"
    )


def _why_not_measured(report: "Report") -> str:
    if report.subject.inputs == "random":
        return RANDOM_INPUTS
    return report.notes[0] if report.notes else "not measured"


def _first_order(report: "Report") -> str:
    if not report.derivative_holds:
        return f"first order is not established: {reason(report)}"
    if report.subject.inputs == "random":
        return "first order is right at every layer and site (size " + (
            f"{RANDOM_INPUTS})"
        )
    base = _smallest([row.radius for row in report.rows])
    midpoint = _smallest([row.radius_midpoint for row in report.rows])
    parts = []
    if base is not None:
        parts.append(f"{_reach(base)} from the base")
    if midpoint is not None:
        parts.append(f"{_reach(midpoint)} from the midpoint")
    if not parts:
        return "first order is right at every layer and site"
    return "first order holds " + ", ".join(parts)


def _smallest(radii: list[Radius | None]) -> Radius | None:
    known = [r for r in radii if r is not None]
    return min(known, key=lambda r: (r.value, r.at_least), default=None)


def _reach(value: Radius) -> str:
    if value.value >= 1:
        return "for all of it"
    return f"to t = {scale(value.value)}"


def meaning(report: "Report") -> list[str]:
    """What the figures say, in plain sentences."""
    said = []
    if report.derivative_holds:
        said.append(
            "The derivative is right at every layer and site: first-order equivalence "
            "holds for small enough updates. How small is the question."
        )
    base = _smallest([row.radius for row in report.rows])
    midpoint = _smallest([row.radius_midpoint for row in report.rows])
    if base is not None:
        limit = percent(base.tolerance)
        said.append(
            f"From the base, the first-order shift is within {limit} of the exact one "
            f"everywhere up to {_times(base)} this update"
            + (
                ""
                if midpoint is None
                else f"; taken at the midpoint W + ΔW/2, up to {_times(midpoint)}"
            )
            + "."
        )
    row, none = best(report), unsteered(report)
    if row is not None and none is not None and (row.recovered or 0) > 0:
        said.append(
            f"The best small steering that was fitted, {row.rung} at {row.site} in "
            f"every layer, makes up for {percent(row.recovered)} of the change in "
            f"behaviour with {row.num_parameters:,} numbers."
        )
    oracle = exact_oracle(report)
    if row is not None and oracle is not None and oracle.recovered is not None:
        everywhere = " in every layer" if report.subject.num_layers > 1 else ""
        said.append(
            f"Setting {oracle.site} to the tuned model's own activation{everywhere} "
            f"recovers {percent(oracle.recovered)}{_out_of_reach(report, oracle)}. The "
            "difference to that is the price of the form."
        )
    return said


def _out_of_reach(report: "Report", oracle: Behaviour) -> str:
    """What the exact oracle leaves, and why; nothing when it is only rounding."""
    if (oracle.recovered or 0.0) > 0.9999 or report.subject.num_layers < 2:
        return ""
    if oracle.site == "block_out":
        return "; the rest is done after the last block, by the update of the head"
    return "; the rest is done by what is added to the stream elsewhere, or by the head"


def _times(value: Radius) -> str:
    return f"{'at least ' if value.at_least else ''}{scale(value.value)} ×"


def exact_oracle(report: "Report") -> Behaviour | None:
    """The exact oracle at the site of the best fitted steering."""
    row = best(report)
    return next(
        (
            b
            for b in report.behaviour
            if row is not None and b.rung == "exact oracle" and b.site == row.site
        ),
        None,
    )
