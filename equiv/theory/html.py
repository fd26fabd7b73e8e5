"""Findings as one self-contained page: no scripts, nothing fetched."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from equiv.report.page import page, style
from equiv.report.prose import joined
from equiv.theory.findings import Findings
from equiv.theory.text import flat, shown
from equiv.theory.values import sentence
from equiv.writing import write_text

if TYPE_CHECKING:
    from markupsafe import Markup


# One letter, perhaps with a prime or tilde, and what stands below the line behind it.
_INDEXED = re.compile(r"(?<![A-Za-z_])([^\W\d_][′\u0303]?)_(\w+(?:,\w+)*|\([^)]*\))")


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
            "set": _set,
            "sentence": sentence,
            "shown": shown,
            "flat": flat,
            "dashed": _dashed,
            "paragraphs": _split,
        },
        style=style(),
        findings=findings,
        wrong=[j for j in findings if (w := j.as_written) and w["verdict"] == "fails"],
        subject=findings.subject,
    )


def _set(text: str) -> "Markup":
    """Formulas with their indices below the line; names of sites are none.

    Example:
        >>> str(_set("W_d Σ_(y|h) <"))
        'W<sub>d</sub> Σ<sub>y|h</sub> &lt;'
        >>> str(_set("mlp_out, x′_FT − h̃_FT,l"))
        'mlp_out, x′<sub>FT</sub> − h̃<sub>FT,l</sub>'
    """
    from markupsafe import Markup, escape

    def below(found: re.Match[str]) -> str:
        index = found[2].removeprefix("(").removesuffix(")")
        return f"{found[1]}<sub>{index}</sub>"

    return Markup(_INDEXED.sub(below, str(escape(joined(text)))))


def _dashed(verdict: str) -> str:
    """A verdict as the name of a style."""
    return verdict.replace(" ", "-")


def _split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n")]
