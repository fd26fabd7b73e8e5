"""Findings as text: a table of verdicts, and one claim explained."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from equiv.report.numbers import figure
from equiv.report.prose import Prose, joined
from equiv.theory.findings import Findings, Judged
from equiv.theory.values import Value, Verdict

WIDTH = 120
STYLES = {
    Verdict.HOLDS: "green",
    Verdict.CONDITIONAL: "yellow",
    Verdict.FAILS: "bold red",
    Verdict.NOT_APPLICABLE: "dim",
    Verdict.INCONCLUSIVE: "magenta",
}
# Longer lists are cut in the text; JSON and the page have all of it.
_ENTRIES = 8


def plain(findings: Findings) -> str:
    """The table as plain text."""
    console = Console(width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(rendered(findings))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def rendered(findings: Findings) -> RenderableType:
    """Every claim's verdict and finding, as something that a rich console prints."""
    table = Table(box=None, show_edge=False, pad_edge=False, show_header=False)
    table.add_column("", justify="right", style="bold")
    table.add_column("", width=12)
    table.add_column("")
    for judged in findings:
        for row in _rows(judged):
            table.add_row(*row)
    return Group(Prose(findings.headline, style="bold"), Text(""), table)


def _rows(judged: Judged) -> Iterator[tuple[str | Text, ...]]:
    """Claim and what was found, then its statement as written, then a blank line."""
    title, found = joined(judged.claim.title), joined(_short(judged))
    yield (
        str(judged.claim.id),
        _verdict(judged.verdict),
        Text.assemble((title, "bold"), "\n", found),
    )
    if (wrong := judged.as_written) is not None:
        said = joined(f"as written: {wrong['statement']}")
        yield (
            "",
            _verdict(wrong["verdict"]),
            Text.assemble((said, "italic"), "\n", joined(wrong["says"])),
        )
    yield ("", "", "")


def _verdict(verdict: Verdict) -> Text:
    return Text(verdict.value, style=STYLES[verdict])


def _short(judged: Judged) -> str:
    """The finding, with the conditions it rests on."""
    named = {
        text: None
        for result in judged.results.values()
        for text in (_listed(result.conditions),)
        if text
    }
    return " · ".join([judged.says, *named])


def _listed(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}: {shown(value)}" for name, value in values.items())


def flat(values: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """Names and values, those of tables inside after the table's own name.

    Example:
        >>> list(flat({"a": {"x": 1, "y": 2}}))
        [('a: x', 1), ('a: y', 2)]
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {key}", inner) for key, inner in flat(value))
        else:
            yield name, value


def shown(value: Value) -> str:
    """A value of evidence in a few characters.

    Example:
        >>> shown([1.0, 0.25]), shown(True), shown({"a": 2e-16})
        ('1, 0.25', 'yes', 'a 2e-16')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return figure(value) if isinstance(value, float) else f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = len(value) - _ENTRIES
        parts = [shown(entry) for entry in value[:_ENTRIES]]
        nested = any(isinstance(entry, (list, tuple)) for entry in value)
        text = ("; " if nested else ", ").join(parts)
        return f"{text}, … ({more} more)" if more > 0 else text
    return "–" if value is None else str(value)


def explained(judged: Judged) -> RenderableType:
    """One claim: statement, derivation and all evidence."""
    claim = judged.claim
    parts: list[RenderableType] = [
        Prose(f"Claim {claim.id}: {claim.title}", style="bold"),
        Text(""),
        Prose(claim.formula, indent="    "),
        Text(""),
        *_facts(judged),
        Text(""),
        Text("Why", style="bold"),
        *_paragraphs(claim.derivation),
    ]
    for update, result in judged.results.items():
        name = f" ({update})" if update else ""
        parts += [
            Text.assemble((f"Found{name}: ", "bold"), _verdict(result.verdict)),
            Prose(result.says, indent="  "),
            *_figures("conditions", result.conditions),
            *_figures("evidence", result.evidence),
            Text(""),
        ]
    if (found := judged.as_written) is not None:
        parts += [
            Text.assemble(("As written: ", "bold"), _verdict(found["verdict"])),
            Prose(f"{found['statement']}. {found['says']}.", indent="  "),
            *_figures("counterexample", found["counterexample"]),
            Text(""),
        ]
    return Group(*parts[:-1])


def _facts(judged: Judged) -> Iterator[RenderableType]:
    claim = judged.claim
    for name, text in (
        ("Assumes", claim.assumptions),
        ("Source", claim.source),
        ("Falsified by", claim.falsified_by),
    ):
        if text:
            yield Prose(f"{name}: {text}")


def _paragraphs(text: str) -> Iterator[RenderableType]:
    for paragraph in text.split("\n\n"):
        yield Prose(" ".join(paragraph.split()), indent="  ")
        yield Text("")


def _figures(title: str, values: Mapping[str, Value]) -> Iterator[RenderableType]:
    """Name and figure, one below the other."""
    if not values:
        return
    table = Table(box=None, show_edge=False, pad_edge=False, show_header=False)
    table.add_column("", ratio=2, overflow="fold")
    table.add_column("", ratio=3, overflow="fold")
    for name, value in flat(values):
        table.add_row(f"    {name}", shown(value))
    yield Text(f"  {title}", style="dim")
    yield table
