"""What the figures of a report say, in plain sentences."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from equiv.report.answer import (
    best,
    exact_oracle,
    offsets,
    smallest,
    unsteered,
    why_not_judged,
    wrong_orders,
)
from equiv.report.first_positions import first_positions
from equiv.report.naming import at, end, everywhere, is_plain, moves_only_output
from equiv.report.numbers import percent, scale
from equiv.report.routing import routing
from equiv.report.values import Behaviour, Radius, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

# A steering with fewer of the model's parameters than this share is called small.
SMALL = 0.1


def meaning(report: "Report") -> list[str]:
    """One sentence or two per question that was measured; never nothing at all."""
    return [
        *_derivative(report),
        *_radii(report),
        *routing(report),
        *first_positions(report),
        *_steering(report),
    ]


def _derivative(report: "Report") -> Iterator[str]:
    if report.derivative_holds:
        yield (
            f"The derivative is right at {everywhere(report)}: first-order equivalence "
            "holds for small enough updates. How small is the question."
        )
        return
    wrong = wrong_orders(report)
    if not wrong:
        yield f"No layer and site could be judged: {why_not_judged(report)}."
        return
    failing = [r for r in wrong if report.judged_order(r).verdict is Verdict.FAILS]
    what = "site" if is_plain(report) else "row"
    at = f"At {len(failing) or len(wrong)} of {len(report.rows)} {what}s"
    found = (
        "the remainder shrinks more slowly than that of a right derivative of a smooth "
        "model"
        if failing
        else "the order of the remainder could not be read off"
    )
    yield (
        f"{at} {found}: first order is not established there, whatever the size of the "
        "remainder."
    )


def _radii(report: "Report") -> Iterator[str]:
    base = smallest([row.radius for row in report.rows])
    midpoint = smallest([row.radius_midpoint for row in report.rows])
    if base is None:
        return
    yield (
        f"From the base, the first-order shift is within {percent(base.tolerance)} of "
        f"the exact one everywhere up to {_times(base)} this update"
        + (
            ""
            if midpoint is None
            else f"; taken at the midpoint W + ΔW/2, up to {_times(midpoint)}"
        )
        + "."
    )


def _times(value: Radius) -> str:
    return f"{'at least ' if value.at_least else ''}{scale(value.value)} ×"


def _steering(report: "Report") -> Iterator[str]:
    none, row = unsteered(report), best(report)
    if none is None or row is None or row.recovered is None:
        return
    if moves_only_output(report):
        yield (
            f"The update moves no activation before the {end(report)}. Steering is "
            "fitted to such movements: here it is fitted to zero, and does nothing."
        )
        return
    if row.recovered <= 0:
        yield (
            "No steering that was fitted helps: at every strength tried it leaves more "
            "of the change in behaviour than no steering at all."
        )
    else:
        yield (
            f"The best {_kind(report, row)} that was fitted, {row.rung} {at(row.site)}"
            f"{_in_layers(report)}, makes up for {percent(row.recovered)} of the "
            f"change in behaviour with {row.num_parameters:,} numbers."
        )
    yield from _oracle(report, row.recovered)
    yield from _offsets(report)


def _kind(report: "Report", row: Behaviour) -> str:
    """What the best fitted steering is the best of."""
    if row.parameter_share is not None and row.parameter_share < SMALL:
        return "small steering"
    better = any(
        other.num_parameters and (other.recovered or 0.0) > (row.recovered or 0.0)
        for other in report.behaviour
        if other.layers == row.layers
    )
    return "steering of low rank" if better else "steering"


def _in_layers(report: "Report") -> str:
    return " in every layer" if report.subject.num_layers > 1 else ""


def _oracle(report: "Report", fitted: float) -> Iterator[str]:
    """What the tuned model's own activations do, and what that says of the form."""
    oracle = exact_oracle(report) if fitted > 0 else _best_oracle(report)
    if oracle is None or oracle.recovered is None:
        return
    setting = f"Setting {oracle.writes} to the tuned model's own activation"
    setting += _in_layers(report)
    share = percent(oracle.recovered)
    rest = _out_of_reach(report, oracle)
    limit = "it is not the form of the steering that sets the limit."
    if max(oracle.recovered, fitted) <= 0:
        yield f"{setting} recovers nothing either: {limit}"
    elif oracle.recovered <= fitted or share == percent(fitted):
        yield f"{setting} recovers {share}, no more than what was fitted: {limit}"
    elif fitted > 0:
        yield (
            f"{setting} recovers {share}{rest}. The difference to that is the price of "
            "the form."
        )
    else:
        yield (
            f"{setting} recovers {share}{rest}. The change could be made there, but "
            "not by the forms that were fitted."
        )


def _offsets(report: "Report") -> Iterator[str]:
    """What adding all layers' shifts at once costs, where it costs anything."""
    oracle, added = exact_oracle(report), offsets(report)
    if oracle is None or added is None:
        return
    one, other = oracle.recovered or 0.0, added.recovered or 0.0
    if other >= one or percent(other) == percent(one):
        return
    worse = ", which is worse than no steering" if other < 0 else ""
    yield (
        f"Adding to {added.writes} in every layer at once the shift that was seen "
        f"there in the unsteered model recovers {percent(other)}{worse}: what is added "
        "below moves the layers above by itself, and is counted again there."
    )


def _best_oracle(report: "Report") -> Behaviour | None:
    return max(
        (b for b in report.behaviour if b.rung == "exact oracle"),
        key=lambda b: b.recovered or 0.0,
        default=None,
    )


def _out_of_reach(report: "Report", oracle: Behaviour) -> str:
    """What the exact oracle leaves, and why; nothing when it is only rounding."""
    if (oracle.recovered or 0.0) > 0.9999 or report.subject.num_layers < 2:
        return ""
    if oracle.writes == "block_out":
        return "; the rest is done after the last block, by the update of the head"
    return "; the rest is done by what is added to the stream elsewhere, or by the head"
