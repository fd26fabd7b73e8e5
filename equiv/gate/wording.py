"""The gate's results in words and as text."""

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from equiv.gate.values import Agreement, Diagnosis, Share, WeightDifference
from equiv.report.numbers import figure, percent
from equiv.report.prose import Prose

WIDTH = 100
ROWS = 12


def reason(found: Agreement) -> str:
    """What differs most, where, by how much, and what it looks like: one line."""
    if found.same:
        return f"{found.actual} is {found.expected}: {found.rule}"
    parts = []
    if found.weights:
        parts.append(_weight(found.weights[0]))
        parts.append(
            f"{len(found.weights)} of {found.compared} matrices differ ({found.rule})"
        )
    sides = {"actual": found.only_actual, "expected": found.only_expected}
    for side, names in sides.items():
        for name in names[:1]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"only the {side} side has `{name}`{more}")
    for setting in found.settings[:1]:
        more = f" and {len(found.settings) - 1} more" if len(found.settings) > 1 else ""
        parts.append(f"another setting: {setting}{more}")
    out = found.outputs
    if out is not None and out.wrong:
        parts.append(
            f"the outputs differ most in sequence {out.sequence} at position "
            f"{out.position}: by {percent(out.largest)} of their norm, tolerance "
            f"{percent(out.tolerance)}; {out.wrong} of {out.tokens} tokens differ"
            + ("" if found.weights else f" ({found.rule})")
        )
    if out is not None and out.undecided:
        return f"not decided: {found.looks_like}"
    if found.looks_like:
        parts.append(f"looks like: {found.looks_like}")
    return "; ".join(parts)


def _weight(row: WeightDifference) -> str:
    if not row.where:
        return f"`{row.name}` is {row.looks_like}"
    place = ", ".join(str(i) for i in row.where)
    by = f"differs most, by {figure(row.largest)} at [{place}]"
    return f"`{row.name}` {by}, tolerance {figure(row.tolerance)}"


def agreement_text(found: Agreement) -> str:
    """The comparison as plain text."""
    return _plain(agreement_rendered(found))


def diagnosis_text(found: Diagnosis) -> str:
    """The diagnosis as plain text."""
    return _plain(diagnosis_rendered(found))


def agreement_rendered(found: Agreement) -> RenderableType:
    """The comparison as something that a rich console prints."""
    word = "Same" if found.same else "Not the same"
    parts: list[RenderableType] = [Prose(f"{word}: {found.reason}", style="bold")]
    if found.weights:
        parts += [Text(""), _weights_table(found.weights)]
    return Group(*parts)


def _weights_table(rows: Sequence[WeightDifference]) -> RenderableType:
    table = Table(box=None, show_edge=False, pad_edge=False)
    for column in ("matrix", "wrong", "largest", "tolerance", "looks like"):
        left = column in ("matrix", "looks like")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for row in rows[:ROWS]:
        table.add_row(
            row.name,
            percent(row.wrong / row.entries),
            figure(row.largest),
            figure(row.tolerance),
            row.looks_like,
        )
    more = len(rows) - ROWS
    return Group(table, Text(f"and {more} more")) if more > 0 else table


def diagnosis_rendered(found: Diagnosis) -> RenderableType:
    """The diagnosis as something that a rich console prints."""
    return Group(*_diagnosis(found))


def _diagnosis(found: Diagnosis) -> Iterator[RenderableType]:
    yield Prose(f"{found.actual}: {found.looks_like}", style="bold")
    yield Text("")
    if found.evidence == "weights":
        said = f"{found.update}, read off the weights, matrix by matrix."
    else:
        said = (
            f"{found.update}, found from outputs by least squares; the shares explain "
            f"{percent(found.explained)} of the change. Cost: "
            f"{found.forwards:.0f} forwards."
        )
    yield Prose(said, style="dim")
    for title, shares in (("layer", found.layers), ("kind of weight", found.kinds)):
        yield Text("")
        yield _shares_table(title, shares)


def _shares_table(title: str, shares: Sequence[Share]) -> Table:
    table = Table(box=None, show_edge=False, pad_edge=False)
    table.add_column(title)
    table.add_column("applied", justify="right")
    table.add_column("±", justify="right")
    table.add_column("looks", overflow="fold")
    for share in shares:
        known = share.coefficient is not None
        table.add_row(
            share.part,
            "–" if share.coefficient is None else share_figure(share.coefficient),
            figure(share.uncertainty, 2) if known else "–",
            share.reason or share.fate.value,
        )
    return table


def share_figure(value: float) -> str:
    """A share that was applied, with three decimals; never a zero with a sign.

    Example:
        >>> share_figure(1.0), share_figure(-0.5), share_figure(-1e-7)
        ('1.000', '−0.500', '0.000')
    """
    text = f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def _plain(made: RenderableType) -> str:
    console = Console(width=WIDTH, no_color=True, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
