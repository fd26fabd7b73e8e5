"""Findings as one self-contained page: no scripts, nothing fetched."""

from pathlib import Path

from equiv.report.page import page, style
from equiv.report.prose import joined
from equiv.theory.findings import Findings
from equiv.theory.text import flat, shown
from equiv.writing import write_text


def write_html(findings: Findings, path: Path) -> None:
    """Write the page; the file is whole or absent."""
    write_text(path, to_html(findings))


def to_html(findings: Findings) -> str:
    """The page as a string.

    Raises:
        MissingExtraError: If jinja2 is not installed.
    """
    return page(
        "equiv.theory",
        "claims.html.j2",
        {
            "joined": joined,
            "shown": shown,
            "flat": flat,
            "dashed": _dashed,
            "paragraphs": _split,
        },
        style=style(),
        findings=findings,
        subject=findings.subject,
    )


def _dashed(verdict: str) -> str:
    """A verdict as the name of a style."""
    return verdict.replace(" ", "-")


def _split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]
