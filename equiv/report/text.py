"""A report as text: for `print(report)` and, with colours, for the command line."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from equiv.report.answer import best, unsteered, why_no_behaviour
from equiv.report.grid import Grid
from equiv.report.meaning import meaning
from equiv.report.naming import (
    at,
    few,
    heads,
    in_order,
    is_plain,
    moves_only_output,
    place,
    subject,
    unit,
)
from equiv.report.numbers import counted, figure, percent, scale
from equiv.report.prose import Prose
from equiv.report.remainders import remainder_tables
from equiv.report.routing import routing_table
from equiv.report.rungs import columns, columns_of
from equiv.report.sizes import sizes
from equiv.report.values import Behaviour, Order, Scope, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

WIDTH = 80
# More complaints than these would bury the rest of the report.
_MOST_COMPLAINTS = 12


def to_text(report: "Report") -> str:
    """The report as plain text, at most 80 columns wide."""
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(rendered(report))
    lines = (line.rstrip() for line in captured.get().splitlines())
    return "\n".join(lines)


def rendered(report: "Report") -> RenderableType:
    """The report as something that a rich console prints, whatever its width."""
    return Group(*_sections(report))


def _sections(report: "Report") -> Iterator[RenderableType]:
    yield Prose(report.headline, style="bold")
    yield Text("")
    yield Prose(subject(report), style="dim")
    yield Text("")
    yield from remainder_tables(report)
    yield from (Prose(line) for line in _orders(report))
    if report.superposition is not None:
        yield Prose(f"Superposition: {report.superposition.reason}.")
    yield Text("")
    yield from routing_table(report)
    yield from _behaviour(report)
    yield from _fits(report)
    yield from sizes(report)
    yield from _coverage(report)
    yield Text("What this means", style="bold")
    yield from (Prose(line, indent="  ") for line in meaning(report))
    yield from (Prose(f"Note: {note}.", style="dim") for note in report.notes)


def _orders(report: "Report") -> Iterator[str]:
    rows, tokens = report.rows, counted(report.subject.calculus_tokens, unit(report))
    said = f"Second order from the base: {_verdicts([r.order for r in rows])}"
    middle = [r.order_midpoint for r in rows if r.order_midpoint is not None]
    if middle:
        said += f"; third order from the midpoint: {_verdicts(middle)}"
    what = "at {} sites" if is_plain(report) else "of {} rows"
    yield f"Taylor test {what.format(len(rows))} on {tokens}. {said}."
    complaints = list(_complaints(report))
    yield from complaints[:_MOST_COMPLAINTS]
    if len(complaints) > _MOST_COMPLAINTS:
        yield f"  and {len(complaints) - _MOST_COMPLAINTS} more"
    ratios = [
        radius.predicted / radius.value
        for row in rows
        for radius in (row.radius, row.radius_midpoint)
        if radius and radius.predicted and radius.value and not radius.at_least
    ]
    if ratios:
        low, high = (figure(r, 2) for r in (min(ratios), max(ratios)))
        yield (
            "Radii predicted from the next term of the series are "
            f"{low} to {high} times those measured."
        )


def _verdicts(orders: Sequence[Order]) -> str:
    counts = Counter(order.verdict.value for order in orders)
    return ", ".join(f"{verdict} at {n}" for verdict, n in counts.items())


def _complaints(report: "Report") -> Iterator[str]:
    """A line per order that fails or could not be seen, the base's first."""
    for midpoint in (False, True):
        for row in report.rows:
            order = row.order_midpoint if midpoint else row.order
            if order and order.verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE):
                where = place(report, row) + (", from the midpoint" if midpoint else "")
                yield f"  {where}: {order.verdict}: {order.reason}"


def _behaviour(report: "Report") -> Iterator[RenderableType]:
    none = unsteered(report)
    if none is None:
        why = why_no_behaviour(report)
        yield Prose(f"Behaviour: {why}.")
    elif moves_only_output(report) or none.recovered is None:
        yield Prose(
            f"Behaviour: {_distance(none)} without steering; no way of steering "
            "changes it."
        )
    else:
        yield from _ladder(report, none)
    if none is not None and none.measure != "kl":
        yield Prose("KL: not applicable (the model has no logits).")
    yield Text("")


def _distance(row: Behaviour) -> str:
    if row.measure == "kl":
        return f"KL {figure(row.distance)} nats per token"
    return f"squared output difference {figure(row.distance)}"


def _ladder(report: "Report", none: Behaviour) -> Iterator[RenderableType]:
    every = [row for row in report.behaviour if row.layers == "all" and row.site]
    sites = columns(every)
    cells = {(row.rung, site): row for row in every for site in columns_of(row, sites)}
    lines = [
        [
            rung.replace("first-order", "1st-order"),
            *(_recovered(cells.get((rung, site))) for site in sites),
        ]
        for rung in dict.fromkeys(row.rung for row in every)
    ]
    layers = "" if is_plain(report) else ", all layers"
    title = f"Recovered of the unsteered model's {_distance(none)}{layers}"
    yield Grid(title, heads("rung", sites), lines)
    yield from (Prose(line) for line in _best_lines(report))


def _recovered(row: Behaviour | None) -> Text:
    if row is None or row.recovered is None:
        return Text("–")
    share = max(0.0, min(1.0, row.recovered))
    bar = "█" * round(5 * share)
    return Text.assemble((f"{bar:<5}", "green"), f" {percent(row.recovered):>6}")


def _best_lines(report: "Report") -> Iterator[str]:
    row = best(report)
    if row is not None and row.strength:
        where = f"{row.rung} {at(row.site)}, strength {scale(row.strength)}"
        if row.measure == "kl":
            yield (
                f"{where}: KL {figure(row.distance)} nats per token (99.9 % of tokens "
                f"below {figure(row.distance_p999)}, largest "
                f"{figure(row.distance_max)}), same top token {percent(row.same_top)}"
            )
            yield from _losses(report, row)
        else:
            yield (
                f"{where}: output off by {percent(row.output_difference)}, cosine "
                f"{figure(row.output_cosine, 5)}"
            )
    alone = [
        r
        for r in report.behaviour
        if r.layers not in ("all", "") and r.site and (r.recovered or 0.0) > 0
    ]
    if alone:
        said = ", ".join(
            f"layer {r.layers} {at(r.site)} {percent(r.recovered)}" for r in alone
        )
        yield f"Best single layers ({alone[0].rung}): {said}."


def _losses(report: "Report", row: Behaviour) -> Iterator[str]:
    """The loss on the labels, where the inputs had any."""
    none = unsteered(report)
    if row.loss is not None and none is not None:
        yield (
            f"Loss on the labels: {figure(none.loss)} unsteered, {figure(row.loss)} "
            f"steered, {figure(row.loss_tuned)} tuned."
        )


def _fits(report: "Report") -> Iterator[RenderableType]:
    """What the largest low-rank form leaves, on sequences that it has not seen."""
    forms = [fit.form for fit in report.fits if fit.form != "affine full"]
    largest = max(forms, key=_size, default="affine full")
    fits = [fit for fit in report.fits if fit.form == largest]
    if not any(fit.misfit_held_out is not None for fit in fits):
        return
    form = fits[0].form
    sites = in_order(fit.site for fit in fits)
    cells = {(fit.layer, fit.site): figure(fit.misfit_held_out) for fit in fits}
    if is_plain(report):
        title = f"Share of the site's own shift that {form} leaves (held out)"
        lines = [[site, cells[0, site]] for site in sites]
        yield Grid(title, ["site", "left"], lines)
    else:
        target = "the block output's" if fits[0].target == "block" else "the site's own"
        title = f"Share of {target} shift that {form} leaves, by the site it reads"
        lines = [
            [str(layer), *(cells.get((layer, site), "–") for site in sites)]
            for layer in dict.fromkeys(fit.layer for fit in fits)
        ]
        yield Grid(f"{title} (held out)", heads("layer", sites), lines)
    scarcest = min(fits, key=lambda fit: fit.tokens_per_dimension)
    if said := few(report, scarcest):
        yield Prose(
            f"{said.capitalize()}, {figure(scarcest.tokens_per_dimension, 2)} per "
            "dimension: fits of full rank may not generalise; the held-out misfit "
            "above is what counts."
        )
    yield Text("")


def _size(form: str) -> int:
    """Rank of the form; a vector has none."""
    return int(form.removeprefix("affine r")) if form != "vector" else 0


def _coverage(report: "Report") -> Iterator[RenderableType]:
    entries = [c for c in report.coverage if c.scope is Scope.PROPAGATED]
    if not entries:
        return
    lines = [
        [
            str(entry.layer),
            figure(entry.shift_mlp_over_block, 2),
            figure(entry.shift_mlp_share, 2),
            figure(entry.activation_mlp_share, 2),
            figure(entry.activation_mlp_over_block, 2),
        ]
        for entry in entries
    ]
    header = ["layer", "δMLP/δblock", "δMLP share", "MLP share", "MLP/block"]
    title = "Coverage: the MLP's part of the shift (δ) and of the stream"
    yield Grid(title, header, lines)
    yield Text("")
