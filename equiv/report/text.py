"""A report as text: for `print(report)` and, with colours, for the command line."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from equiv.report.answer import RANDOM_INPUTS, best, inputs, meaning, unsteered
from equiv.report.numbers import figure, percent, scale
from equiv.report.prose import Prose
from equiv.report.values import Behaviour, Order, Radius, Row, Scope, Verdict

if TYPE_CHECKING:
    from equiv.report.report import Report

WIDTH = 80
# Remainders up to each bound, with the shade and colour that stand for them.
_SHADES = (
    (0.01, "·", "on #1a9850"),
    (0.1, "░", "on #91cf60"),
    (0.3, "▒", "on #fee08b"),
    (0.6, "▓", "on #fc8d59"),
    (float("inf"), "█", "on #d73027"),
)


def to_text(report: "Report") -> str:
    """The report as plain text, at most 80 columns wide."""
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(rendered(report))
    lines = (line.rstrip() for line in captured.get().splitlines())
    return "\n".join(lines)


def rendered(report: "Report") -> RenderableType:
    """The report as something that a rich console prints."""
    return Group(*_sections(report))


def _sections(report: "Report") -> Iterator[RenderableType]:
    yield Prose(report.headline, style="bold")
    yield Text("")
    yield Prose(_subject(report), style="dim")
    yield Text("")
    yield _shift_table(report)
    yield from (Prose(line) for line in _orders(report))
    if report.superposition is not None:
        yield Prose(f"Superposition: {report.superposition.reason}.")
    yield Text("")
    yield from _behaviour(report)
    yield from _by_layer(report)
    yield from _coverage(report)
    yield Text("What this means", style="bold")
    yield from (Prose(line, indent="  ") for line in meaning(report))
    yield from (Prose(f"Note: {note}.", style="dim") for note in report.notes)


def _subject(report: "Report") -> str:
    s = report.subject
    return (
        f"{s.model}, {s.num_parameters:,} parameters, {s.num_layers} layers · "
        f"{s.update}, {percent(s.update_relative_norm)} of the weights' norm · "
        f"{inputs(s)}"
    )


def _shift_table(report: "Report") -> RenderableType:
    rows = [r for r in report.rows if r.scope is Scope.PROPAGATED]
    sites = list(dict.fromkeys(row.site for row in rows))
    layers = list(dict.fromkeys(row.layer for row in rows))
    cells = {(row.layer, row.site): row for row in rows}
    title = "Percent of the shift that first order misses, from base | midpoint"
    if len(layers) <= 2 and len(sites) > 5:
        return _by_site(rows, title)
    inside = [s for s in sites if any((layer, s) in cells for layer in layers[:-1])]
    ends = [row for row in rows if row.site not in inside]
    missed, reach = _table("layer", *inside), _table("layer", *inside)
    for layer in layers:
        found = [cells.get((layer, site)) for site in inside]
        if any(found):
            missed.add_row(str(layer), *(_cell(report, row) for row in found))
            reach.add_row(str(layer), *(_reaches(row) for row in found))
    for row in ends:
        filler = [Text("")] * (len(inside) - 1)
        missed.add_row(row.site, *filler, _cell(report, row))
        reach.add_row(row.site, *filler, _reaches(row))
    parts = [_titled(title, missed), Text(_legend())]
    if any(row.radius is not None for row in rows):
        limit = percent(report.subject.tolerance)
        within = f"Radius: share of the update up to which it misses at most {limit}"
        parts += [Text(""), _titled(within, reach)]
    return Group(*parts)


def _by_site(rows: Sequence[Row], title: str) -> RenderableType:
    table = _table("site", "base", "midpoint", "radius", "radius, midpoint")
    for row in rows:
        table.add_row(
            row.site,
            _shaded(row.remainder, _percentage(row.remainder)),
            _shaded(row.remainder_midpoint, _percentage(row.remainder_midpoint)),
            _reach(row.radius),
            _reach(row.radius_midpoint),
        )
    return Group(_titled(title, table), Text(_legend()))


def _titled(title: str, table: Table) -> RenderableType:
    """A title above a table, as wide as the page and not as the table."""
    return Group(Prose(title, style="bold"), table)


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _cell(report: "Report", row: Row | None) -> Text:
    if row is None:
        return Text("")
    if row.order.verdict is Verdict.NOT_APPLICABLE:
        return Text("no shift", style="dim")
    text = _percentage(row.remainder)
    if row.remainder_midpoint is not None:
        text += f" | {_percentage(row.remainder_midpoint)}"
    return _shaded(report.judged_remainder(row), text)


def _percentage(share: float | None) -> str:
    """The number alone: the title says that it is percent."""
    if share is None:
        return "–"
    return f"{100 * share:.0f}" if share >= 0.995 else figure(100 * share, 2)


def _reaches(row: Row | None) -> str:
    if row is None:
        return ""
    if row.radius_midpoint is None:
        return _reach(row.radius)
    return f"{_reach(row.radius)} | {_reach(row.radius_midpoint)}"


def _reach(radius: Radius | None) -> str:
    if radius is None:
        return "–"
    return f"{'≥ ' if radius.at_least else ''}{scale(radius.value)}"


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


def _orders(report: "Report") -> Iterator[str]:
    tokens = report.subject.calculus_tokens
    said = f"Second order from the base: {_counted([r.order for r in report.rows])}"
    middle = [r.order_midpoint for r in report.rows if r.order_midpoint is not None]
    if middle:
        said += f"; third order from the midpoint: {_counted(middle)}"
    yield f"Taylor test of {len(report.rows)} rows on {tokens:,} tokens. {said}."
    for row in report.rows:
        if row.order.verdict in (Verdict.FAILS, Verdict.INCONCLUSIVE):
            yield (
                f"  layer {row.layer}, {row.site}, {row.scope}: {row.order.verdict}: "
                f"{row.order.reason}"
            )
    ratios = [
        radius.predicted / radius.value
        for row in report.rows
        for radius in (row.radius, row.radius_midpoint)
        if radius and radius.predicted and radius.value and not radius.at_least
    ]
    if ratios:
        low, high = (figure(r, 2) for r in (min(ratios), max(ratios)))
        yield (
            "Radii predicted from the next term of the series are "
            f"{low} to {high} times those measured."
        )


def _counted(orders: Sequence[Order]) -> str:
    counts = Counter(order.verdict.value for order in orders)
    return ", ".join(f"{n} {verdict}" for verdict, n in counts.items())


def _behaviour(report: "Report") -> Iterator[RenderableType]:
    none = unsteered(report)
    if none is None:
        why = RANDOM_INPUTS if report.subject.inputs == "random" else "not measured"
        yield Prose(f"Behaviour: {why}.")
        yield Text("")
        return
    every = [row for row in report.behaviour if row.layers == "all" and row.site]
    rungs = list(dict.fromkeys(row.rung for row in every))
    sites = list(dict.fromkeys(row.site for row in every))
    unit = (
        "nats of KL per token" if none.measure == "kl" else "squared output difference"
    )
    title = (
        f"Recovered of the unsteered model's {figure(none.distance)} {unit}, all layers"
    )
    table = _table("rung", *sites)
    cells = {(row.rung, row.site): row for row in every}
    for rung in rungs:
        found = (cells.get((rung, site)) for site in sites)
        name = rung.replace("first-order", "1st-order")
        table.add_row(name, *(_recovered(row) for row in found))
    yield _titled(title, table)
    yield from (Prose(line) for line in _best_lines(report))
    yield Text("")


def _recovered(row: Behaviour | None) -> Text:
    if row is None or row.recovered is None:
        return Text("–")
    share = max(0.0, min(1.0, row.recovered))
    bar = "█" * round(5 * share)
    return Text.assemble((f"{bar:<5}", "green"), f" {percent(row.recovered):>6}")


def _best_lines(report: "Report") -> Iterator[str]:
    row = best(report)
    if row is not None and row.measure == "kl":
        yield (
            f"{row.rung} at {row.site}: KL {figure(row.distance)} nats per token (99.9 "
            f"% of tokens below {figure(row.distance_p999)}, largest "
            f"{figure(row.distance_max)}), same top token {percent(row.same_top)}, "
            f"strength {row.strength}"
        )
    elif row is not None:
        yield (
            f"{row.rung} at {row.site}: output off by "
            f"{percent(row.output_difference)}, cosine "
            f"{figure(row.output_cosine, 5)}, strength {row.strength}"
        )
    alone = [r for r in report.behaviour if r.layers not in ("all", "") and r.site]
    if alone:
        said = ", ".join(
            f"layer {r.layers} at {r.site} {percent(r.recovered)}" for r in alone
        )
        yield f"Best single layers ({alone[0].rung}): {said}."


def _by_layer(report: "Report") -> Iterator[RenderableType]:
    form = f"affine r{report.subject.rank}"
    fits = [fit for fit in report.fits if fit.form == form]
    if not fits:
        return
    sites = list(dict.fromkeys(fit.site for fit in fits))
    cells = {(fit.layer, fit.site): fit for fit in fits}
    target = "the block output's" if fits[0].target == "block" else "the site's own"
    title = f"Share of {target} shift that {form} leaves, by the site it reads"
    table = _table("layer", *sites)
    for layer in dict.fromkeys(fit.layer for fit in fits):
        found = [cells.get((layer, site)) for site in sites]
        shares = [figure(fit.misfit_held_out) if fit else "–" for fit in found]
        table.add_row(str(layer), *shares)
    yield _titled(f"{title} (held out)", table)
    few = next((fit for fit in fits if fit.verdict != "measured"), None)
    if few is not None:
        yield Prose(f"{few.verdict.capitalize()}: {few.reason}.")
    yield Text("")


def _coverage(report: "Report") -> Iterator[RenderableType]:
    entries = [c for c in report.coverage if c.scope is Scope.PROPAGATED]
    if not entries:
        return
    table = _table("layer", "δMLP/δblock", "δMLP share", "MLP share", "MLP/block")
    for entry in entries:
        ratios = (
            entry.shift_mlp_over_block,
            entry.shift_mlp_share,
            entry.activation_mlp_share,
            entry.activation_mlp_over_block,
        )
        table.add_row(str(entry.layer), *(figure(value, 2) for value in ratios))
    yield _titled("Coverage: the MLP's part of the shift (δ) and of the stream", table)
    yield Text("")
