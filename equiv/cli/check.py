"""Behind `equiv check`: updates by name; reports shown, written, judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from equiv.cli.writing import write_outputs
from equiv.errors import ArgumentError
from equiv.report.answer import best
from equiv.report.numbers import percent
from equiv.report.report import Report
from equiv.report.text import WIDTH, rendered


def by_name(updates: Sequence[str]) -> str | dict[str, str]:
    """One update as it is, several under the names they were given by.

    Raises:
        ArgumentError: If one is given twice.

    Example:
        >>> by_name(["lora"]), by_name(["lora", "tuned"])
        ('lora', {'lora': 'lora', 'tuned': 'tuned'})
    """
    if len(updates) == 1:
        return updates[0]
    for name in updates:
        if updates.count(name) > 1:
            raise ArgumentError(f"The update {name!r} is given more than once.")
    return {name: name for name in updates}


def check_share(min_recovered: float | None, inputs: str | None) -> None:
    """Refuse a share of the behaviour that cannot be reached or is not measured.

    Raises:
        ArgumentError: If it is one.
    """
    if min_recovered is None:
        return
    if not min_recovered <= 1:
        raise ArgumentError(
            f"Expected --min-recovered of at most 1 (all of it), got {min_recovered}."
        )
    if inputs is None:
        raise ArgumentError(
            "--min-recovered needs --inputs: on random token ids no behaviour is "
            "measured. Pass a file of texts."
        )


def files_of(path: Path | None, count: int) -> list[Path | None]:
    """One file per report: numbered from 1 where there are several.

    Example:
        >>> [file.name for file in files_of(Path("out/report.html"), 2)]
        ['report-1.html', 'report-2.html']
    """
    if path is None or count == 1:
        return [path] * count
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def show(reports: Mapping[str, Report], json: Path | None, html: Path | None) -> None:
    """Print reports, under the names of their updates if there are several."""
    console = Console(highlight=False)
    width = max(WIDTH, min(console.width, 100))
    count = len(reports)
    written = zip(files_of(json, count), files_of(html, count), strict=True)
    for (name, report), (data, page) in zip(reports.items(), written, strict=True):
        if count > 1:
            console.print(Text(f"\n{name}\n", style="bold"), width=width)
        console.print(rendered(report), width=width)
        write_outputs(data, report.to_json, page, report.to_html)


def met(reports: Mapping[str, Report], min_recovered: float | None) -> bool:
    """Whether all reports meet what was asked for; says what does not."""
    missed = []
    for name, report in reports.items():
        where = f"{name}: " if len(reports) > 1 else ""
        missed += [where + reason for reason in _missed(report, min_recovered)]
    for reason in missed:
        typer.echo(f"Not met: {reason}")
    return not missed


def _missed(report: Report, min_recovered: float | None) -> list[str]:
    missed = [] if report.holds else [report.reason]
    if min_recovered is not None:
        row = best(report)
        found = None if row is None else row.recovered
        if found is None or found < min_recovered:
            missed.append(
                f"steering recovers {percent(found)}, expected at least "
                f"{percent(min_recovered)}"
            )
    return missed
