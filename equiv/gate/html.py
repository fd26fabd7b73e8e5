"""A comparison as one self-contained page: no scripts, nothing fetched at all."""

import math
import re
from pathlib import Path

from equiv.gate.picture import BOTTOM, LEFT, RIGHT, WIDTH, picture
from equiv.gate.values import Agreement, Diagnosis
from equiv.gate.wording import share_figure
from equiv.report import numbers
from equiv.report.page import page, style
from equiv.report.prose import joined
from equiv.writing import write_text

# More matrices than these are folded away.
ROWS = 24


def write_html(
    path: Path,
    *,
    agreement: Agreement | None = None,
    diagnosis: Diagnosis | None = None,
) -> None:
    """Write the page of either or both; the file is whole or absent."""
    write_text(path, to_html(agreement, diagnosis))


def to_html(agreement: Agreement | None, diagnosis: Diagnosis | None) -> str:
    """The page as a string.

    Raises:
        MissingExtraError: If jinja2 is not installed.
    """
    return page(
        "equiv.gate",
        "gate.html.j2",
        {
            "figure": _figure,
            "share": _share,
            "percent": numbers.percent,
            "joined": joined,
            "code": _code,
            "picture": picture,
        },
        style=style(),
        headline=_headline(agreement, diagnosis),
        agreement=agreement,
        diagnosis=diagnosis,
        rows=ROWS,
        width=WIDTH,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=BOTTOM,
    )


def _headline(agreement: Agreement | None, diagnosis: Diagnosis | None) -> str:
    """The answer in short: the same or not, and what happened to the update."""
    if agreement is None:
        assert diagnosis is not None
        return f"{diagnosis.actual}: {diagnosis.looks_like}"
    if agreement.same:
        return f"{agreement.actual} is {agreement.expected}"
    story = agreement.looks_like if diagnosis is None else diagnosis.looks_like
    said = f"{agreement.actual} is not {agreement.expected}"
    return f"{said}: {story}" if story else said


def _code(text: str) -> str:
    """Names between backticks as code.

    Example:
        >>> str(_code("`a.weight` < 1"))
        '<code>a.weight</code> &lt; 1'
    """
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _figure(value: float | None, digits: int = 3) -> str:
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return numbers.figure(value, digits)


def _share(value: float | None) -> str:
    """A share with three decimals, so that a column of them is easy to compare.

    Example:
        >>> _share(1.0), _share(-0.5), _share(None)
        ('1.000', '−0.500', '–')
    """
    if value is None or not math.isfinite(value):
        return _figure(value)
    return share_figure(value)
